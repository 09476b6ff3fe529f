"""One thread trains while another builds, copies, loads or deletes models."""

import contextlib
import copy
import gc
import io
import pickle
import threading

import pytest
import torch
from helpers_rescale import Net, adapted, backward, layers_of, train, trainable
from peft import PeftModel
from peft.tuners import lora

from peft_scalora.layer import LAYERS, ScaLoRALayer, scalora_class
from peft_scalora.live import LiveSet


def in_another_thread(work):
    """Run `work` in a thread and wait for it; raise what it raised."""
    failures = []

    def run():
        try:
            work()
        except BaseException as failure:
            failures.append(failure)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if failures:
        raise failures[0]


def build(kept, folder):
    kept.append(adapted(Net()))


def deep_copy(kept, folder):
    kept.append(copy.deepcopy(kept[0]))


def load(kept, folder):
    kept.append(PeftModel.from_pretrained(Net(), folder, is_trainable=True))


def unpickle(kept, folder):
    kept.append(pickle.loads(pickle.dumps(kept[0])))


def add_an_adapter(kept, folder):
    kept[0].add_adapter("other", copy.deepcopy(kept[0].peft_config["default"]))


def delete_an_adapter(kept, folder):
    kept[0].delete_adapter("default")
    kept[0].add_adapter("default", copy.deepcopy(kept[0].peft_config["spare"]))
    kept[0].set_adapter("default")


def delete(kept, folder):
    kept.clear()
    gc.collect()


@pytest.mark.parametrize(
    "meanwhile", [build, deep_copy, load, unpickle, add_an_adapter, delete_an_adapter, delete], ids=lambda f: f.__name__
)
def test_models_change_in_another_thread_while_an_optimizer_looks_for_its_layers(meanwhile, monkeypatch, tmp_path):
    """The other thread's whole work is done between two layers that the step looks at."""
    model, kept = adapted(Net(), scaling_interval=1), [adapted(Net())]
    kept[0].save_pretrained(tmp_path)
    kept[0].add_adapter("spare", copy.deepcopy(kept[0].peft_config["default"]))
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-3)
    backward(model)
    linear = type(layers_of(model)[0])
    factors, trainer, calls = linear.factors, threading.get_ident(), []

    def factors_and_more(layer, adapter):
        if threading.get_ident() == trainer and not calls:
            calls.append(adapter)
            in_another_thread(lambda: meanwhile(kept, tmp_path))
        return factors(layer, adapter)

    monkeypatch.setattr(linear, "factors", factors_and_more)
    optimizer.step()
    monkeypatch.undo()
    assert calls
    assert [layer.progress("default").rescalings for layer in layers_of(model)] == [1, 1, 1]
    for other in kept:  # and the new ones are found
        train(other, torch.optim.AdamW(trainable(other), lr=1e-3), 2)
        assert [layer.progress("default").steps for layer in layers_of(other)] == [2, 2, 2]


def test_live_objects_while_threads_add_and_drop_some():
    class Member:
        pass

    live, stop = LiveSet(), threading.Event()
    stays = [Member() for _ in range(5)]
    for member in stays:
        live.add(member)

    def churn():
        while not stop.is_set():
            for member in [Member() for _ in range(50)]:
                live.add(member)

    threads = [threading.Thread(target=churn) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(300):
            assert set(stays) <= set(live)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    gc.collect()
    assert set(live) == set(stays)
    version = live.version
    live.add(stays[0])
    assert live.version is not version and len(list(live)) == 5
    del stays, member
    gc.collect()
    assert not live


def test_threads_that_build_the_first_layer_of_a_kind_get_one_class():
    """Of two, pickle would refuse one."""

    class Linear(lora.Linear):
        pass

    barrier, made = threading.Barrier(2), []

    class Slow(type(Linear)):
        """Makes the work on the first class last until both threads are at it, or one has waited for the other."""

        def __getattribute__(cls, name):
            if name == "forward" and not barrier.broken:
                with contextlib.suppress(threading.BrokenBarrierError):
                    barrier.wait(0.5)
            return super().__getattribute__(name)

    cls = Slow("Linear", (Linear,), {})
    threads = [threading.Thread(target=lambda: made.append(scalora_class(cls))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 2 and made[0] is made[1]
    assert issubclass(made[0], ScaLoRALayer)


def test_a_model_can_be_pickled_after_threads_have_built_models():
    models = []
    threads = [threading.Thread(target=lambda: models.append(adapted(Net()))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for model in models:
        loaded = torch.load(io.BytesIO(_saved(model)), weights_only=False)
        assert all(layer in set(LAYERS) for layer in layers_of(loaded))


def _saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    return file.getvalue()
