"""SIGINT and SIGTERM: the step is finished and saved, and a second SIGINT does not wait."""

import os
import signal
import threading

import pytest

from glmkern.errors import Interrupted
from glmkern.training.loop.hooks import Hooks
from glmkern.training.loop.signals import StopRequest
from glmkern.training.loop.trainer import Trainer
from glmkern.training.output.run_folder import RunFolder
from tests.training.stand_in import StandIn, arguments, simple_rows


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.fixture
def handlers():
    """The handlers before and after the test are the same."""
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    yield
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


class Signalling(StandIn):
    """Sends signals to its own process while it computes its third loss."""

    def __init__(self, *signals: int):
        super().__init__()
        self.signals = signals

    def loss(self, batch, dropout_offset, seed):
        loss = super().loss(batch, dropout_offset, seed)
        for number in self.signals if len(self.calls) == 3 else ():
            send(number)
        return loss


def trainer(model, folder=None, **flags) -> Trainer:
    return Trainer(
        model,
        simple_rows(8),
        arguments(**{"per_device_train_batch_size": 2, "max_steps": 6, "save_steps": 50, **flags}),
        folder=folder and RunFolder(folder),
    )


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_step_is_finished_and_saved(tmp_path, handlers, number, status, capfd):
    stopped = trainer(Signalling(number), tmp_path)
    with pytest.raises(Interrupted) as error:
        stopped.train()
    assert error.value.status == status
    assert str(error.value) == f"stopped after step 3; saved in {tmp_path}/checkpoint-3"
    assert stopped.state.global_step == 3
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-3"}
    assert "Ctrl-C again stops at once" in capfd.readouterr().err


def test_what_was_just_saved_is_not_saved_again(tmp_path, handlers):
    saves = []
    stopped = trainer(Signalling(signal.SIGTERM), tmp_path, save_steps=3)
    stopped.hooks = Hooks(on_save=lambda folder, step: saves.append((folder.name, step)))
    with pytest.raises(Interrupted):
        stopped.train()
    assert saves == [("checkpoint-3", 3)]


def test_without_a_folder(handlers):
    with pytest.raises(Interrupted, match="stopped after step 3; nothing is saved"):
        trainer(Signalling(signal.SIGTERM)).train()


def test_a_second_interrupt_does_not_wait(tmp_path, handlers):
    stopped = trainer(Signalling(signal.SIGINT, signal.SIGINT), tmp_path)
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    assert stopped.state.global_step == 2
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_what_a_launcher_repeats_is_not_a_second_wish(tmp_path, handlers, monkeypatch, second):
    if second == signal.SIGINT:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    with pytest.raises(Interrupted) as error:
        trainer(Signalling(signal.SIGINT, second), tmp_path).train()
    assert error.value.status == 130


def test_other_threads_have_no_signals(handlers):
    ends = []
    thread = threading.Thread(target=lambda: ends.append(trainer(StandIn()).train()["epoch"]))
    thread.start()
    thread.join()
    assert ends == [1.5]


def test_handlers_come_back_after_an_error(handlers):
    with pytest.raises(ZeroDivisionError), StopRequest() as request:
        send(signal.SIGTERM)
        assert request.signal == signal.SIGTERM
        raise ZeroDivisionError
