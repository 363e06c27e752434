"""The data files of a run: read, turned into rows, reported, and checked against the base."""

from collections.abc import Sequence
from dataclasses import dataclass

from glmkern.errors import InputError
from glmkern.model.config import ChatGLMConfig
from glmkern.tokenizer import ChatGLMTokenizer
from glmkern.training.data.examples import Example, Examples, read_examples
from glmkern.training.data.rows import EvaluationData, TrainingRows, build_training_rows
from glmkern.training.flags.arguments import Arguments, DataTrainingArguments


@dataclass(frozen=True)
class TrainingData:
    """The rows of --train_file."""

    examples: Examples
    rows: TrainingRows


@dataclass(frozen=True)
class RunData:
    """What a run trains on and measures; None for what it does not.

    `samples` are the prompts of samples.md: the first of --validation_file, or of --train_file
    where there is none.
    """

    train: TrainingData | None = None
    validation: EvaluationData | None = None
    test: EvaluationData | None = None
    samples: Sequence[Example] = ()


def read_data(arguments: Arguments, tokenizer: ChatGLMTokenizer, config: ChatGLMConfig) -> RunData:
    """Read the files of the tasks asked for, and print what became of their rows.

    Raises InputError where a file is wrong or its rows are too long for the base.
    """
    args, training = arguments.data, arguments.training
    train = validation = test = None
    samples: Sequence[Example] = ()
    if training.do_train:
        train = training_data(args, tokenizer, config)
        print(f"{args.train_file}: ", end="")
        print(*describe_rows(train.rows, args), sep="\n")
        first = train.rows.rows[0]
        _print_example(first.input_ids, first.labels, tokenizer)
    if arguments.evaluates:
        examples = _read(args.validation_file, args, args.max_eval_samples)
        validation = _evaluation_data(args.validation_file, examples, arguments, tokenizer, config)
    if training.do_train and training.sample_prompts:
        samples = _sample_source(args, train, validation)[: training.sample_prompts]
    if training.do_predict:
        examples = _read(args.test_file, args, args.max_predict_samples)
        test = _evaluation_data(args.test_file, examples, arguments, tokenizer, config)
    return RunData(train, validation, test, samples)


def training_data(
    args: DataTrainingArguments, tokenizer: ChatGLMTokenizer, config: ChatGLMConfig
) -> TrainingData:
    """Read --train_file; InputError where it is wrong or its rows are too long for the base."""
    examples = _read(args.train_file, args, args.max_train_samples)
    rows = build_training_rows(
        examples,
        tokenizer,
        max_source_length=args.max_source_length,
        max_target_length=args.max_target_length,
        source_prefix=args.source_prefix,
        ignore_pad_token_for_loss=args.ignore_pad_token_for_loss,
    )
    _check_fit(rows, config)
    return TrainingData(examples, rows)


def describe_rows(rows: TrainingRows, args: DataTrainingArguments) -> list[str]:
    """What became of the training rows, and what packing saves against the official padding."""
    width = args.padded_length
    lengths = [len(row.input_ids) for row in rows.rows]
    return [
        rows.report(),
        f"tokens a row: {_statistics(lengths)}",
        f"padding avoided: {1 - sum(lengths) / (width * len(lengths)):.0%} of the official {width} "
        "tokens a row",
        f"the end token is learned in all {len(lengths):,} rows, after a cut response too",
    ]


def _sample_source(
    args: DataTrainingArguments, train: TrainingData, validation: EvaluationData | None
) -> Sequence[Example]:
    """Rows of --validation_file, or, where nothing else needs that file and it is unfit, of
    --train_file."""
    if validation is not None:
        return validation.examples
    if args.validation_file is not None:
        try:
            return _read(args.validation_file, args, args.max_eval_samples)
        except InputError as error:
            print(f"samples.md answers rows of {args.train_file}, because {error}")
    return train.examples


def _read(path: str, args: DataTrainingArguments, limit: int | None) -> Examples:
    return read_examples(path, args.prompt_column, args.response_column, args.history_column, limit)


def _evaluation_data(
    path: str,
    examples: Examples,
    arguments: Arguments,
    tokenizer: ChatGLMTokenizer,
    config: ChatGLMConfig,
) -> EvaluationData:
    args = arguments.data
    flag = args.evaluation_target_flag
    data = EvaluationData.of(
        examples,
        tokenizer,
        max_source_length=args.max_source_length,
        max_target_length=getattr(args, flag),
        source_prefix=args.source_prefix,
    )
    prompts = data.prompts
    _check_fit(data.rows, config)
    print(f"{path}: {prompts.report(flag)}")
    print(f"tokens a prompt: {_statistics([sum(mask) for mask in prompts.attention_mask])}")
    _print_example(prompts.input_ids[0], prompts.labels[0], tokenizer)
    return data


def _check_fit(rows: TrainingRows, config: ChatGLMConfig) -> None:
    longest = max(len(row.input_ids) for row in rows.rows)
    if longest > config.seq_length:
        raise InputError(
            f"the longest row has {longest} tokens, but the base has {config.seq_length} positions;"
            " lower --max_source_length or --max_target_length"
        )


def _statistics(lengths: list[int]) -> str:
    lengths = sorted(lengths)
    total = sum(lengths)
    return (
        f"mean {total / len(lengths):.1f}, median {lengths[len(lengths) // 2]}, "
        f"longest {lengths[-1]}; {total:,} in all"
    )


def _print_example(input_ids: list[int], labels: list[int], tokenizer: ChatGLMTokenizer) -> None:
    """The first row, as the official script prints it."""
    print("input_ids", input_ids)
    print("inputs", tokenizer.decode(input_ids))
    print("label_ids", labels)
    print("labels", tokenizer.decode(labels))
