"""Exceptions at chosen lines of a file, as a signal would raise them."""

import sys


class Stop(BaseException):
    """Not even an Exception."""


def lines_until(limit, file, call, ignore=()):
    """Call, and raise `Stop` at so many lines run in that file; give how many were run.

    A limit of 0 is none. Functions whose names are ignored count no lines.
    """
    n_lines = 0

    def trace(frame, event, argument):
        nonlocal n_lines
        if frame.f_code.co_filename != file:
            return None
        if event == "line" and frame.f_code.co_name not in ignore:
            n_lines += 1
            if n_lines == limit:
                raise Stop
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return n_lines
