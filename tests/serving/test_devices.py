"""Each worker is given its own device and sees no other.

On a machine with two GPUs the whole of it is shown by

    python -m repro experiment=split options.prefill.devices=[cuda:0] options.decode.devices=[cuda:1]

and, with three, a prefill that is spread over two of them by `options.prefill.devices=[cuda:0,cuda:1]`,

whose provenance holds, under `devices`, what each worker saw.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

from repro.errors import UserError
from repro.serving.devices import hand_out_devices, one_device

PRINT = "import os; print(os.environ['CUDA_VISIBLE_DEVICES'], os.environ['HIP_VISIBLE_DEVICES'])"


def visible(prefill: str, decode: str, gpus: int, *, share: bool = False) -> dict[str, tuple[str, str]]:
    """What a program sees that is started as each worker is, and the device's name there."""
    found = {}
    for side, given in hand_out_devices([prefill], [decode], share=share, gpus=gpus).items():
        done = subprocess.run(
            [sys.executable, "-c", PRINT], env=dict(given.environment), capture_output=True, text=True
        )
        found[side] = (done.stdout.strip("\n"), given.devices[0])
    return found


@pytest.mark.parametrize(
    ("prefill", "decode"), [("cuda:0", "cuda:1"), ("auto", "auto"), ("cuda", "cuda"), ("auto", "cuda:1")]
)
def test_each_worker_sees_its_own_gpu_and_no_other(prefill: str, decode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("HIP_VISIBLE_DEVICES", raising=False)
    assert visible(prefill, decode, gpus=2) == {"prefill": ("0 0", "cuda:0"), "decode": ("1 1", "cuda:0")}


def test_numbers_count_within_what_this_process_may_see(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    found = hand_out_devices(["cuda:1"], ["cuda:0"], share=False, gpus=2)
    assert [found[side].environment["CUDA_VISIBLE_DEVICES"] for side in ("prefill", "decode")] == ["7", "4"]


def test_a_worker_over_several_gpus_sees_them_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7,9")
    found = hand_out_devices(["cuda:2", "cuda:0"], ["auto"], share=False, gpus=3)
    assert found["prefill"].environment["CUDA_VISIBLE_DEVICES"] == "9,4"
    assert found["prefill"].devices == ("cuda:0", "cuda:1")
    assert found["decode"].environment["CUDA_VISIBLE_DEVICES"] == "7"
    with pytest.raises(UserError, match="cuda:0 is the other worker's"):
        hand_out_devices(["cuda:2", "cuda:0"], ["cuda:0"], share=False, gpus=3)


def test_a_worker_on_the_cpu_sees_no_gpu_at_all() -> None:
    assert visible("cpu", "auto", gpus=0) == {"prefill": (" ", "cpu"), "decode": (" ", "cpu")}
    assert visible("cpu", "cuda", gpus=1)["prefill"] == (" ", "cpu")


def test_a_process_that_computes_itself_takes_one_device_by_the_same_rules() -> None:
    chosen = [
        one_device("options.device", name, gpus)
        for name, gpus in (("auto", 0), ("auto", 2), ("cuda", 2), ("cuda:1", 2))
    ]
    assert chosen == ["cpu", "cuda:0", "cuda:0", "cuda:1"]
    for name in ("mps", "cuda:0,cuda:1", "cuda:2", "gpu"):
        with pytest.raises(UserError, match=r"^options\.device: "):
            one_device("options.device", name, 2)


@pytest.mark.parametrize("devices", [("cuda:0", "cuda:0"), ("cuda", "auto"), ("auto", "auto")])
def test_a_shared_gpu_must_be_asked_for(devices: tuple[str, str]) -> None:
    with pytest.raises(UserError, match=r"options\.\w+\.devices: cuda:0 is the other worker's.*options\.share_device"):
        hand_out_devices(devices[:1], devices[1:], share=False, gpus=1)
    found = hand_out_devices(devices[:1], devices[1:], share=True, gpus=1)
    assert {given.outside for given in found.values()} == {("cuda:0",)}


@pytest.mark.parametrize(
    ("devices", "words"),
    [
        (["mps"], "options.prefill.devices: mps; times would be those of launches"),
        (["xpu:0"], "options.prefill.devices: xpu:0; times would be those of launches"),
        (["cuda:2"], "options.prefill.devices: cuda:2; accepted: cuda:0 to cuda:1"),
        (["gpu"], "options.prefill.devices: 'gpu'; accepted: cpu, cuda"),
        (["cuda:0", "cpu"], "options.prefill.devices: cpu among 2; accepted of several: cuda:<number>"),
        (
            ["cuda:0", "cuda:0"],
            "options.prefill.devices: ['cuda:0', 'cuda:0']; accepted: one device or more, each once",
        ),
        ([], "options.prefill.devices: []; accepted: one device or more"),
    ],
)
def test_what_no_worker_can_compute_on_is_refused_by_its_key(devices: list[str], words: str) -> None:
    with pytest.raises(UserError) as raised:
        hand_out_devices(devices, ["cpu"], share=False, gpus=2)
    assert str(raised.value).startswith(words)


def test_a_gpu_where_there_is_none_is_refused() -> None:
    with pytest.raises(UserError, match=r"options\.decode\.devices: cuda, but torch sees no GPU"):
        hand_out_devices(["cpu"], ["cuda"], share=False, gpus=0)
