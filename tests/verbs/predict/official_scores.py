"""The official answers and scores, written with other people's code."""

import json
from pathlib import Path
from statistics import fmean

import jieba
import torch
from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
from rouge_chinese import Rouge

from bench.oracles import twin_forward

PREFIX_LENGTH = 5


SCORES = ("rouge-1", "rouge-2", "rouge-l", "bleu-4")


SPEED = ("runtime", "samples", "samples_per_second", "steps_per_second")


SOURCE, TARGET = 40, 12


def predictions(folder: Path) -> list[dict[str, str]]:
    lines = (folder / "generated_predictions.txt").read_text().split("\n")
    assert lines.pop() == ""
    return [json.loads(line) for line in lines]


def results(folder: Path, split: str) -> dict[str, float]:
    return json.loads((folder / f"{split}_results.json").read_text())


def names(split: str, *metrics: str) -> set[str]:
    return {f"{split}_{name}" for name in (*metrics, *SPEED)}


def official_prompts(tokenizer, records) -> dict[str, torch.Tensor]:
    prompts = [f"[Round 1]\n\n问：{record['content']}\n\n答：" for record in records]
    columns = tokenizer(prompts, padding=True, truncation=True, max_length=SOURCE)
    return {name: torch.tensor(column) for name, column in columns.items()}


@torch.no_grad()
def official_greedy(twin, prompts: dict[str, torch.Tensor], max_length: int) -> list[list[int]]:
    """Rows one at a time, padded, without a cache."""
    answers = []
    for ids, mask, positions in zip(*prompts.values(), strict=True):
        width = len(ids)
        while len(ids) < max_length and int(ids[-1]) != 2:
            _, logits = twin_forward(twin, ids[None], mask[None], positions[None])
            ids = torch.cat([ids, logits[0, -1].argmax()[None]])
            mask = torch.cat([mask, mask.new_ones(1)])
            positions = torch.cat([positions, positions[-1:] + 1])
        answers.append(ids[width:].tolist())
    return answers


def official_scores(pairs: list[tuple[str, str]]) -> dict[str, float]:
    """compute_metrics of ptuning/main.py, which has no answer without text."""
    scores = {name: [] for name in SCORES}
    for predict, label in pairs:
        rouge = Rouge().get_scores(" ".join(jieba.cut(predict)), " ".join(jieba.cut(label)))[0]
        for name, value in rouge.items():
            scores[name].append(round(value["f"] * 100, 4))
        bleu = sentence_bleu(
            [list(label)], list(predict), smoothing_function=SmoothingFunction().method3
        )
        scores["bleu-4"].append(round(bleu * 100, 4))
    return {name: fmean(values) for name, values in scores.items()}


def official_labels(tokenizer, records) -> list[str]:
    ids = tokenizer([record["summary"] for record in records], truncation=True, max_length=TARGET)
    return [tokenizer.decode(row) for row in ids["input_ids"]]


def text(tokenizer, ids: list[int]) -> str:
    """Ids beyond the vocabulary, for which the official decoding has an error, are padding."""
    return tokenizer.decode([token if token < tokenizer.vocab_size else 0 for token in ids])
