"""Writes the files of format 0.31 beside this script. Run with mlx-lm 0.31.3 and mlx 0.32.4."""

from cases import CASES, write

if __name__ == "__main__":
    write("0.31.3", "v031", CASES)
