"""The official scores of an answer: ROUGE over jieba's words, BLEU-4 over characters."""

import logging

from glmkern.training.flags.packages import SCORES, require_score_packages


class Scores:
    """The scores of answers so far.

    Attributes:
        count: answers added.
        empty: those of them that scored 0 because they, or their references, hold no text. The
            official script ends with an error at the first one.
    """

    def __init__(self):
        require_score_packages()
        import jieba
        from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
        from rouge_chinese import Rouge

        jieba.setLogLevel(logging.WARNING)
        self._words, self._rouge = jieba.cut, Rouge()
        self._bleu, self._smoothing = sentence_bleu, SmoothingFunction().method3
        self._totals = dict.fromkeys(SCORES, 0.0)
        self.count = self.empty = 0

    def add(self, answer: str, reference: str) -> dict[str, float]:
        """Score one more answer; returns its scores, 0 to 100 with four decimals."""
        if answer.strip() and reference.strip():
            scores = self._score(answer, reference)
        else:
            scores = dict.fromkeys(SCORES, 0.0)
            self.empty += 1
        for name, value in scores.items():
            self._totals[name] += value
        self.count += 1
        return scores

    def means(self) -> dict[str, float]:
        """The mean of each score over the answers added, of which there must be one."""
        return {name: total / self.count for name, total in self._totals.items()}

    def _score(self, answer: str, reference: str) -> dict[str, float]:
        rouge = self._rouge.get_scores(
            " ".join(self._words(answer)), " ".join(self._words(reference))
        )[0]
        scores = {name: rouge[name]["f"] for name in SCORES[:3]}
        scores["bleu-4"] = self._bleu(
            [list(reference)], list(answer), smoothing_function=self._smoothing
        )
        return {name: round(100 * value, 4) for name, value in scores.items()}
