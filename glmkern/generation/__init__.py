"""Text from a model: cache, sampling, beam search, and the loops over them; a file each."""

from glmkern.generation.cache import KeyValueCache
from glmkern.generation.decoding import generate, stream_generate

__all__ = ["KeyValueCache", "generate", "stream_generate"]
