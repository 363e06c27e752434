"""Conversations: chat, stream_chat and `glmkern chat`, with the real tokenizer on small models."""

import builtins
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from glmkern import ChatGLMConfig, ChatGLMTokenizer, cli
from glmkern.chat import process_response
from glmkern.checkpoint import write_base, write_prefix
from glmkern.generation import KeyValueCache
from glmkern.model.prefix import PrefixEncoder
from glmkern.verbs import chat as verb
from tests.generation.oracles import Recorder, glm_twin
from tests.model.oracles import SMALL, small_model

POSITIONS = 300
TALKATIVE = dict(padded_vocab_size=65024, seq_length=POSITIONS, eos_token_id=2, pad_token_id=0,
                 hidden_size=20, ffn_hidden_size=30, num_layers=2)


@pytest.fixture(scope="module")
def tokenizer(shared):
    return ChatGLMTokenizer.from_pretrained(shared / "data" / "tokenizer")


def chat_model(**options):
    """A model that says nothing that the tokenizer has no text for, and comes to an end. Its base
    is always the same one."""
    torch.manual_seed(3)
    model = small_model(TALKATIVE, **options)
    model.transformer.output_layer.weight[64789:] = 0
    model.transformer.output_layer.weight[2] *= 5
    return model


@pytest.fixture(scope="module")
def model():
    return chat_model()


HISTORY = [("你好", "你好👋"), ("1+1", "2")]


# chat

def test_chat_draws_what_transformers_draws(tokenizer):
    """The official defaults: top_p 0.8, temperature 0.8, top_k 50, under the same seed."""
    model = chat_model(pre_seq_len=None)
    twin = glm_twin(model)
    prompt = torch.tensor([tokenizer.build_inputs("晚上睡不着应该怎么办", HISTORY)])
    torch.manual_seed(8)
    response, history = model.chat(tokenizer, "晚上睡不着应该怎么办", HISTORY, max_length=120)
    torch.manual_seed(8)
    ids = twin.generate(prompt, attention_mask=torch.ones_like(prompt), max_length=120,
                        do_sample=True, top_p=0.8, temperature=0.8, top_k=50, pad_token_id=0)
    assert response == tokenizer.decode(ids[0, prompt.shape[1]:].tolist()).strip() != ""
    assert history == [*HISTORY, ("晚上睡不着应该怎么办", response)]
    assert len(HISTORY) == 2


def test_chat_passes_its_options_on(model, tokenizer):
    prompt = torch.tensor([tokenizer.build_inputs("你好")])
    greedy = model.generate(prompt, max_length=80)[0, prompt.shape[1]:].tolist()
    reply, _ = model.chat(tokenizer, "你好", max_length=80, do_sample=False)
    assert reply == process_response(tokenizer.decode(greedy))
    beams = model.generate(prompt, max_length=80, num_beams=3)[0, prompt.shape[1]:].tolist()
    reply, _ = model.chat(tokenizer, "你好", max_length=80, do_sample=False, num_beams=3)
    assert reply == process_response(tokenizer.decode(beams))
    recorder = Recorder()
    model.chat(tokenizer, "你好", max_length=40, logits_processor=[recorder], eos_token_id=[])
    assert len(recorder.scores) == 40 - prompt.shape[1]


def test_max_length_ends_at_the_positions_of_the_model(model, tokenizer):
    recorder = Recorder()
    model.chat(tokenizer, "你好", logits_processor=[recorder], eos_token_id=[])
    assert len(recorder.scores) == POSITIONS - len(tokenizer.build_inputs("你好"))
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


@pytest.mark.parametrize(("text", "expected"), [
    ("  我是\n", "我是"), ("截至[[训练时间]]，[[训练时间]]", "截至2023年，2023年"), ("", "")])
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

    responses = [response for response, _ in model.stream_chat(
        tokenizer, "你好", logits_processor=[say])]
    assert responses == ["啊", "啊👋", "啊👋"]  # the last step is the end token
    assert len(tokens) > 3 + 1


def test_a_conversation_on_its_cache(model, tokenizer):
    """The second round reads only itself, behind all but the last token of the first one."""
    options = dict(max_length=60, do_sample=False, return_past_key_values=True)
    *_, (reply, history, past) = model.stream_chat(tokenizer, "你好", **options)
    prompt = tokenizer.build_inputs("你好")
    first = model.generate(torch.tensor([prompt]), max_length=60)[0].tolist()
    assert past.lens.tolist() == [len(first) - 1]
    options["max_length"] = 120
    *_, (second, both, again) = model.stream_chat(tokenizer, "再见", history,
                                                  past_key_values=past, **options)
    assert again is past
    read = torch.tensor([first[:-1] + tokenizer.build_stream_inputs("再见", history)])
    ids = model.generate(read, max_length=120)[0, read.shape[1]:].tolist()
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
            tokenizer, "你好", HISTORY, past, return_past_key_values=True, **options)
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
    assert said == [*history, {"role": "user", "content": "你好"},
                    {"role": "assistant", "metadata": "", "content": response}]
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
        roles, "你好", logits_processor=[saying(roles, spoken)], **options)
    assert first == "我"
    read = roles.build_chat_input("你好") + roles.encode(spoken[0], add_special_tokens=False)
    assert past.lens.tolist() == [len(read)]  # the end token is read by nobody
    *_, (second, _, _) = model.stream_chat(roles, "再见", said, past, max_length=200, **options)
    read += roles.build_chat_input("再见")[2:]
    ids = model.generate(torch.tensor([read]), max_length=200, eos_token_id=roles.stop_token_ids)
    ids = [token for token in ids[0, len(read):].tolist() if token not in roles.stop_token_ids]
    # A first line is metadata, which the reply is without.
    assert second == process_response(roles.decode(ids).partition("\n")[2] or roles.decode(ids))


# Several prefixes

def test_prefixes_by_name(tokenizer, tmp_path):
    model = chat_model(pre_seq_len=5)
    torch.manual_seed(1)
    prompt = torch.tensor([tokenizer.build_inputs("你好")])

    def text():
        return model.generate(prompt, max_length=60).tolist()

    texts = {"default": text()}
    for name, length, projection in (("law", 3, False), ("ads", 9, True)):
        encoder = PrefixEncoder(model.config, length, projection)
        write_prefix(tmp_path / name, encoder.state_dict())
        alone = chat_model(pre_seq_len=length, projection=projection)
        alone.load_state_dict({k: v for k, v in model.state_dict().items() if "prefix" not in k},
                              strict=False, assign=True)
        alone.prefix_encoder.load_state_dict(encoder.state_dict())
        texts[name] = alone.generate(prompt, max_length=60).tolist()
        model.load_prefix(tmp_path / name, name)
        assert model.prefix_name == "default"  # loading changes nothing
    assert model.prefix_names == ["default", "law", "ads"]
    plain = chat_model(pre_seq_len=None)
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if "prefix" not in k},
                          assign=True)
    texts[None] = plain.generate(prompt, max_length=60).tolist()
    assert len({json.dumps(each) for each in texts.values()}) == 4

    for name in ("ads", None, "law", "default", "ads"):
        model.use_prefix(name)
        assert model.prefix_name == name and text() == texts[name]
        keys = {key for key in model.state_dict() if "prefix_encoder" in key}
        trained = {key for key, each in model.named_parameters() if each.requires_grad}
        assert keys == trained
        assert len(keys) == {"ads": 5, None: 0}.get(name, 1)
        assert model.config.pre_seq_len == {"default": 5, "law": 3, "ads": 9, None: None}[name]
        assert model.config.prefix_projection == (name == "ads")
    # A new prefix of the name that is in use is in use.
    model.load_prefix(tmp_path / "law", "ads")
    assert model.prefix_name == "ads" and text() == texts["law"]


def test_prefixes_that_are_not_there(tmp_path):
    model = small_model()
    with pytest.raises(cli.InputError, match="no prefix 'law'; loaded: default"):
        model.use_prefix("law")
    with pytest.raises(cli.InputError, match="no prefix 'law'; loaded: none"):
        small_model(pre_seq_len=None).use_prefix("law")
    write_prefix(tmp_path, {"embedding.weight": torch.zeros(4, 7)})
    with pytest.raises(cli.InputError, match="has 7 columns, but this base needs"):
        model.load_prefix(tmp_path, "law")
    assert model.prefix_names == ["default"]


# glmkern chat

@pytest.fixture(scope="module")
def base(model, tokenizer, tmp_path_factory):
    """A base folder, and the folders of two prefixes in it."""
    folder = tmp_path_factory.mktemp("chat")
    weights = {k: v for k, v in model.state_dict().items() if "prefix" not in k}
    write_base(folder / "base", ChatGLMConfig.from_dict(SMALL | TALKATIVE), weights)
    tokenizer.save(folder / "base")
    torch.manual_seed(5)
    for name, length in (("law", 3), ("ads", 6)):
        write_prefix(folder / name, PrefixEncoder(model.config, length).state_dict())
    return folder


class Spoken:
    """What a user types, line by line: a text, or an exception that is raised instead."""

    def __init__(self, *lines):
        self.lines = list(lines)

    def __call__(self, prompt):
        line = self.lines.pop(0)
        if isinstance(line, str):
            return line
        raise line


@pytest.fixture
def talk(model, tokenizer, monkeypatch, capsys):
    """Runs a conversation; returns it and what was printed behind the banner."""
    def run(*lines, prefixes=(), tokenizer=tokenizer, **options):
        options = dict(max_length=250, do_sample=False) | options
        conversation = verb.Conversation(model, tokenizer, list(prefixes), options)
        monkeypatch.setattr(builtins, "input", Spoken(*lines))
        conversation.run()
        return conversation, capsys.readouterr().out.removeprefix(verb.BANNER + "\n")

    return run


def reply_to(model, tokenizer, query, history=()):
    return model.chat(tokenizer, query, history, max_length=250, do_sample=False)[0]


def test_rounds_clear_and_stop(talk, model, tokenizer):
    first = reply_to(model, tokenizer, "你好")
    conversation, printed = talk("你好", "  ", "clear", "你好", "stop", "never read")
    assert printed == f"\nChatGLM：{first}\n已清空 cleared\n\nChatGLM：{first}\n"
    assert conversation.history == [("你好", first)]
    conversation, printed = talk("你好", "再见", EOFError())
    assert [said for said, _ in conversation.history] == ["你好", "再见"]
    *_, (second, _, _) = model.stream_chat(
        tokenizer, "再见", conversation.history[:1], past_of(model, tokenizer, "你好"),
        return_past_key_values=True, max_length=250, do_sample=False)
    assert conversation.history[1][1] == second and second in printed


def past_of(model, tokenizer, query):
    *_, (_, _, past) = model.stream_chat(tokenizer, query, max_length=250, do_sample=False,
                                         return_past_key_values=True)
    return past


def test_interrupts(talk, model, tokenizer):
    """Ctrl-C within a reply keeps what was printed and goes on; at the prompt it leaves."""
    class Interrupting(ChatGLMTokenizer):
        calls = 0

        def decode(self, ids):
            self.calls += 1
            if self.calls == 4:
                signal.raise_signal(signal.SIGINT)
            return super().decode(ids)

    breaking = Interrupting(tokenizer._model)
    conversation, printed = talk("你好", "再见", KeyboardInterrupt(), tokenizer=breaking)
    whole = reply_to(model, tokenizer, "你好")
    (query, part), (_, second) = conversation.history
    assert query == "你好" and part and whole.startswith(part) and len(part) < len(whole)
    assert second == reply_to(model, tokenizer, "再见", [("你好", part)])
    assert printed == f"\nChatGLM：{part} …\n\nChatGLM：{second}\n\n"


def test_what_is_no_text_and_what_has_no_room(talk):
    conversation, printed = talk("a\udcff", "1" * 400, "stop")
    assert "the text is '\\udcff', half of a surrogate pair" in printed
    assert "leave no room for a reply within 250" in printed
    assert conversation.history == [] and conversation.past is None


def test_switching_prefixes(talk, model, tokenizer, base):
    model.load_prefix(base / "law", "law")
    try:
        conversation, printed = talk("/prefix", "你好", "/prefix law", "再见", "/prefix none",
                                     "/prefix tax", "stop", prefixes=["default", "law"])
        model.use_prefix("law")
        second = reply_to(model, tokenizer, "再见", conversation.history[:1])
    finally:
        model.use_prefix("default")
    first = reply_to(model, tokenizer, "你好")
    assert conversation.history == [("你好", first), ("再见", second)]
    assert printed == (
        f"{verb.PREFIXES}\n[default] law none\n\nChatGLM：{first}\ndefault [law] none\n"
        f"\nChatGLM：{second}\ndefault law [none]\n"
        "there is no prefix 'tax'; loaded: default, law\n")


def test_the_command_reads_a_pipe(base, model, tokenizer):
    command = [sys.executable, "-m", "glmkern", "chat", "--model_name_or_path",
               str(base / "base"), "--prefix", f"law={base / 'law'}", "--prefix",
               f"ads={base / 'ads'}", "--greedy", "--max_length", "250", "--pre_seq_len", "3"]
    spoken = "你好\n".encode() + b"\xff\xfe\n" + "/prefix ads\n你好\n".encode()
    done = subprocess.run(command, input=spoken, capture_output=True, timeout=120,
                          cwd=Path(__file__).resolve().parents[1])
    assert done.returncode == 0, done.stderr.decode()
    printed = done.stdout.decode()
    model.load_prefix(base / "law", "law")
    model.load_prefix(base / "ads", "ads")
    try:
        model.use_prefix("law")
        first = reply_to(model, tokenizer, "你好")
        model.use_prefix("ads")
        second = reply_to(model, tokenizer, "你好", [("你好", first)])
    finally:
        model.use_prefix("default")
    assert printed.startswith(verb.BANNER)
    for expected in (first, "half of a surrogate pair", "law [ads] none", second):
        assert expected in printed
        printed = printed[printed.index(expected) + len(expected):]


def test_the_command_begins_with_ptuning_checkpoint(base, monkeypatch, capsys):
    monkeypatch.setattr(builtins, "input", Spoken("/prefix", "stop"))
    common = ["chat", "--model_name_or_path", str(base / "base")]
    assert cli.main([*common, "--prefix", f"law={base / 'law'}", "--ptuning_checkpoint",
                     str(base / "ads"), "--quantization_bit", "4"]) == 0
    assert "[default] law none" in capsys.readouterr().out
    monkeypatch.setattr(builtins, "input", Spoken("/prefix", EOFError()))
    assert cli.main(common) == 0
    assert capsys.readouterr().out == f"{verb.BANNER}\n[none]\n\n"


@pytest.mark.parametrize(("flags", "sentence"), [
    (["--prefix", "law"], "--prefix takes NAME=DIR, not 'law'"),
    (["--prefix", "none=x"], "--prefix none=x: the name 'none' is taken"),
    (["--prefix", "a=x", "--prefix", "a=y"], "--prefix a=y: the name 'a' is taken"),
    (["--prefix", "a=/nowhere"], "there is no prefix checkpoint /nowhere"),
    (["--prefix", "law={base}/law", "--pre_seq_len", "4"],
     "the prefix 'law' holds 3 virtual tokens, not 4"),
])
def test_the_command_refuses(base, capsys, flags, sentence):
    flags = [flag.format(base=base) for flag in flags]
    assert cli.main(["chat", "--model_name_or_path", str(base / "base"), *flags]) == 2
    assert sentence in capsys.readouterr().err


def test_help_needs_no_torch():
    code = ("import sys; from glmkern.cli import main; main(['chat', '--help']); "
            "main(['chat', '--prefix']); sys.exit('torch' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True,
                          cwd=Path(__file__).resolve().parents[1])
    assert done.returncode == 0 and b"--top_p" in done.stdout
