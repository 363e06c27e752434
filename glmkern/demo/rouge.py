"""ROUGE-L over characters."""


def rouge_l(prediction: str, reference: str) -> float:
    """F1 of the longest common subsequence of two texts' characters, 0 to 1.

    Lin, "ROUGE: A Package for Automatic Evaluation of Summaries" (2004), section 3, with beta = 1;
    Chinese is compared by character, which needs no word segmentation.
    """
    common = _longest_common_subsequence(prediction, reference)
    return 2 * common / (len(prediction) + len(reference)) if common else 0.0


def _longest_common_subsequence(a: str, b: str) -> int:
    lengths = [0] * (len(b) + 1)  # of a's characters so far against each beginning of b
    for x in a:
        diagonal = 0
        for j, y in enumerate(b, 1):
            above = lengths[j]
            lengths[j] = diagonal + 1 if x == y else max(above, lengths[j - 1])
            diagonal = above
    return lengths[-1]
