"""chat and stream_chat, in rounds and in messages."""

import pytest
import torch

from glmkern import ChatGLMTokenizer
from glmkern.generation import KeyValueCache
from glmkern.generation.chat import process_response
from tests.generation.models import HISTORY, POSITIONS, chat_model
from tests.generation.oracles import Recorder, glm_twin

# chat


def test_chat_draws_what_transformers_draws(tokenizer):
    """The official defaults: top_p 0.8, temperature 0.8, top_k 50, under the same seed."""
    model = chat_model(pre_seq_len=None)
    twin = glm_twin(model)
    prompt = torch.tensor([tokenizer.build_inputs("晚上睡不着应该怎么办", HISTORY)])
    torch.manual_seed(8)
    response, history = model.chat(tokenizer, "晚上睡不着应该怎么办", HISTORY, max_length=120)
    torch.manual_seed(8)
    ids = twin.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_length=120,
        do_sample=True,
        top_p=0.8,
        temperature=0.8,
        top_k=50,
        pad_token_id=0,
    )
    assert response == tokenizer.decode(ids[0, prompt.shape[1] :].tolist()).strip() != ""
    assert history == [*HISTORY, ("晚上睡不着应该怎么办", response)]
    assert len(HISTORY) == 2


def test_chat_passes_its_options_on(model, tokenizer):
    prompt = torch.tensor([tokenizer.build_inputs("你好")])
    greedy = model.generate(prompt, max_length=80)[0, prompt.shape[1] :].tolist()
    reply, _ = model.chat(tokenizer, "你好", max_length=80, do_sample=False)
    assert reply == process_response(tokenizer.decode(greedy))
    beams = model.generate(prompt, max_length=80, num_beams=3)[0, prompt.shape[1] :].tolist()
    reply, _ = model.chat(tokenizer, "你好", max_length=80, do_sample=False, num_beams=3)
    assert reply == process_response(tokenizer.decode(beams))
    recorder = Recorder()
    model.chat(tokenizer, "你好", max_length=40, logits_processor=[recorder], eos_token_id=[])
    assert len(recorder.scores) == 40 - prompt.shape[1]


def test_max_length_ends_at_the_positions_of_the_model(model, tokenizer):
    recorder = Recorder()
    long = [("1" * 230, "你好")]
    model.chat(tokenizer, "你好", long, logits_processor=[recorder], eos_token_id=[])
    assert len(recorder.scores) == POSITIONS - len(tokenizer.build_inputs("你好", long)) > 9
    long = [("1" * 400, "你好")]
    tokens = len(tokenizer.build_inputs("你好", long))
    with pytest.raises(ValueError, match=f"has {tokens} tokens, which leave no room .* within 300"):
        model.chat(tokenizer, "你好", long)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_invalid_scores_say_token_5(tokenizer, bad):
    model = chat_model()
    model.transformer.output_layer.weight[77] = bad
    prompt = len(tokenizer.build_inputs("你好"))
    response, _ = model.chat(tokenizer, "你好", max_length=prompt + 4)
    assert response == tokenizer.decode([5] * 4).strip()


@pytest.mark.parametrize(
    ("text", "expected"),
    [("  我是\n", "我是"), ("截至[[训练时间]]，[[训练时间]]", "截至2023年，2023年"), ("", "")],
)
def test_process_response(text, expected):
    assert process_response(text) == expected


# stream_chat


def test_a_stream_grows_to_what_chat_says(model, tokenizer):
    whole, history = model.chat(tokenizer, "你好", HISTORY, max_length=250, do_sample=False)
    steps = list(model.stream_chat(tokenizer, "你好", HISTORY, max_length=250, do_sample=False))
    assert steps[-1] == (whole, history)
    for (shorter, _), (longer, rounds) in zip(steps, steps[1:], strict=False):
        assert len(shorter) <= len(longer)
        assert rounds == [*HISTORY, ("你好", longer)]
    for response, _ in steps:
        assert response and not response.endswith("\ufffd")


def test_a_character_of_several_tokens_is_shown_when_it_is_whole(model, tokenizer):
    said = iter(tokenizer.encode("啊👋", add_special_tokens=False) + [2])
    tokens = []

    def say(input_ids, scores):
        tokens.append(next(said))
        return torch.full_like(scores, -1e4).index_fill(1, torch.tensor(tokens[-1:]), 0.0)

    responses = [
        response for response, _ in model.stream_chat(tokenizer, "你好", logits_processor=[say])
    ]
    assert responses == ["啊", "啊👋", "啊👋"]  # the last step is the end token
    assert len(tokens) > 3 + 1


def test_a_conversation_on_its_cache(model, tokenizer):
    """The second round reads only itself, after all but the last token of the first one."""
    options = dict(max_length=60, do_sample=False, return_past_key_values=True)
    *_, (reply, history, past) = model.stream_chat(tokenizer, "你好", **options)
    prompt = tokenizer.build_inputs("你好")
    first = model.generate(torch.tensor([prompt]), max_length=60)[0].tolist()
    assert past.lens.tolist() == [len(first) - 1]
    options["max_length"] = 120
    *_, (second, both, again) = model.stream_chat(
        tokenizer, "再见", history, past_key_values=past, **options
    )
    assert again is past
    read = torch.tensor([first[:-1] + tokenizer.build_stream_inputs("再见", history)])
    ids = model.generate(read, max_length=120)[0, read.shape[1] :].tolist()
    assert second == process_response(tokenizer.decode(ids))
    assert both == [("你好", reply), ("再见", second)]
    with pytest.raises(ValueError, match="the conversation has .* no room for a reply within 120"):
        next(model.stream_chat(tokenizer, "再见" * 99, both, past_key_values=past, **options))


def test_without_a_cache_the_whole_history_is_read(model, tokenizer):
    """Also where the cache is asked for: the official code then forgets what was said."""
    options = dict(max_length=180, do_sample=False)
    whole, _ = model.chat(tokenizer, "你好", HISTORY, **options)
    for past in (None, KeyValueCache(model)):
        *_, (response, _, _) = model.stream_chat(
            tokenizer, "你好", HISTORY, past, return_past_key_values=True, **options
        )
        assert response == whole


# ChatGLM3


class Roles(ChatGLMTokenizer):
    """ChatGLM3's prompt, written down from its layout: a role's id, its first line and its content,
    both with a space of their own; the prompt ends in the assistant's id."""

    def __init__(self, model):
        super().__init__(model, {"name_or_path": "THUDM/chatglm3-6b"})
        self.stop_token_ids = [2, self.get_command("<|user|>"), self.get_command("<|observation|>")]

    def build_chat_input(self, query, history=None, role="user"):
        ids = list(self.prefix_tokens)
        for each in [*(history or ()), {"role": role, "content": query}]:
            ids.append(self.get_command(f"<|{each['role']}|>"))
            for text in (each.get("metadata", "") + "\n", each["content"]):
                ids += self.encode(text, add_special_tokens=False)
        return [*ids, self.get_command("<|assistant|>")]


@pytest.fixture(scope="module")
def roles(tokenizer):
    return Roles(tokenizer._model)


def saying(tokenizer, *texts):
    """A processor that has the model say texts, each of which ends in a special token's name."""
    ids = []
    for text, end in texts:
        ids += tokenizer.encode(text, add_special_tokens=False) + [tokenizer.get_command(end)]
    said = iter(ids)

    def say(input_ids, scores):
        return torch.full_like(scores, -1e4).index_fill(1, torch.tensor([next(said)]), 0.0)

    return say


def test_messages_of_roles(model, roles):
    history = [{"role": "system", "content": "你是助手"}]
    say = saying(roles, ("\n 你好\n[[训练时间]]", "<|user|>"))
    response, said = model.chat(roles, "你好", history, logits_processor=[say])
    assert response == "你好\n2023年"
    assert said == [
        *history,
        {"role": "user", "content": "你好"},
        {"role": "assistant", "metadata": "", "content": response},
    ]
    assert len(history) == 1
    say = saying(roles, ("\n 看", "<|assistant|>"), ("weather\n tool(city)", "<|observation|>"))
    response, said = model.chat(roles, "天气", said, logits_processor=[say])
    assert [each.get("metadata") for each in said[-2:]] == ["", "weather"]
    assert said[-2]["content"] == "看" and "tool(city)" in response == said[-1]["content"]
    seen = []

    def see(input_ids, scores):
        seen.append(input_ids[0].tolist())
        return scores

    model.chat(roles, "晴", said, role="observation", logits_processor=[see])
    assert seen[0] == roles.build_chat_input("晴", said, "observation")


def test_roles_on_their_cache(model, roles):
    """The second message follows on what was read and said, without a second beginning."""
    options = dict(return_past_key_values=True, do_sample=False)
    spoken = "\n 我", "<|user|>"
    *_, (first, said, past) = model.stream_chat(
        roles, "你好", logits_processor=[saying(roles, spoken)], **options
    )
    assert first == "我"
    read = roles.build_chat_input("你好") + roles.encode(spoken[0], add_special_tokens=False)
    assert past.lens.tolist() == [len(read)]  # the end token is read by nobody
    *_, (second, _, _) = model.stream_chat(roles, "再见", said, past, max_length=200, **options)
    read += roles.build_chat_input("再见")[2:]
    ids = model.generate(torch.tensor([read]), max_length=200, eos_token_id=roles.stop_token_ids)
    ids = [token for token in ids[0, len(read) :].tolist() if token not in roles.stop_token_ids]
    # A first line is metadata, which the reply is without.
    assert second == process_response(roles.decode(ids).partition("\n")[2] or roles.decode(ids))
