"""mlx-lm's server on a prompt store: what requests compute is found again, after a restart too."""

from mlxrs_py.serving.prompt_cache import StoredPromptCache
from mlxrs_py.serving.stored_model import Recording, StoredModel

__all__ = ["Recording", "StoredModel", "StoredPromptCache"]
