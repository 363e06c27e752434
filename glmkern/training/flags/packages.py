"""The packages that --predict_with_generate needs, and the scores they give."""

from importlib.util import find_spec

from glmkern.errors import InputError

SCORES = ("rouge-1", "rouge-2", "rouge-l", "bleu-4")
SCORE_PACKAGES = ("jieba", "rouge_chinese", "nltk")


def require_score_packages() -> None:
    """Raise InputError where a package that the scores need is not installed; imports none."""
    missing = [name for name in SCORE_PACKAGES if find_spec(name) is None]
    if missing:
        raise InputError(
            f"--predict_with_generate needs {' and '.join(missing)} for its scores; "
            "pip install 'glmkern[eval]'"
        )
