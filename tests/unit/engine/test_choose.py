"""What is chosen where there is a compiler and where there is none, and that the log says so."""

import ctypes
import subprocess
from pathlib import Path

import pytest
import torch

from pyramidserve.errors import ConfigurationError
from workers.backends.cpu import build
from workers.backends.cpu.build import KernelBuildError, load_library
from workers.backends.reference import ReferenceBackend
from workers.engine import choose
from workers.engine.choose import choose_backend, choose_dtype, choose_kv_dtype

CPU = torch.device("cpu")
WITH, WITHOUT = {"avx512_bf16": True}, {"avx512_bf16": False, "amx_bf16": False}


def no_library() -> ctypes.CDLL:
    raise KernelBuildError("no compiler")


def a_library() -> ctypes.CDLL:
    return ctypes.CDLL(None)


@pytest.mark.parametrize(
    ("native", "library", "chosen"),
    [
        (WITH, no_library, torch.bfloat16),
        ({"amx_bf16": True}, no_library, torch.bfloat16),
        (WITHOUT, a_library, torch.bfloat16),
        (WITHOUT, no_library, torch.float32),
    ],
)
def test_auto_takes_bfloat16_where_that_is_fast(
    native: dict[str, bool], library: object, chosen: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: native)
    monkeypatch.setattr(choose, "load_library", library)
    assert choose_dtype("auto", CPU) is chosen


def test_a_type_by_name_is_obeyed() -> None:
    assert choose_dtype("bfloat16", CPU) is torch.bfloat16
    assert choose_dtype("float32", CPU) is torch.float32


def test_half_precision_is_left_to_torch() -> None:
    assert isinstance(choose_backend("auto", CPU, torch.float16), ReferenceBackend)


def test_without_a_compiler_the_log_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PYRAMIDSERVE_CACHE", str(tmp_path))
    monkeypatch.setenv("CC", "no-such-compiler")
    assert isinstance(choose_backend("auto", CPU, torch.float32), ReferenceBackend)
    assert "backend='reference'" in caplog.text
    assert "no-such-compiler" in caplog.text
    assert caplog.records[-1].levelname == "WARNING"
    with pytest.raises(ConfigurationError, match=r"backend is 'cpu', but .*no-such-compiler.*'reference'"):
        choose_backend("cpu", CPU, torch.float32)


def test_the_reference_is_there_where_a_compiler_is_too() -> None:
    assert isinstance(choose_backend("reference", CPU, torch.float32), ReferenceBackend)


def test_compiled_kernels_are_refused_where_they_cannot_run() -> None:
    with pytest.raises(ConfigurationError, match=r"not torch.float16 on cpu; give 'auto' or 'reference'"):
        choose_backend("cpu", CPU, torch.float16)
    with pytest.raises(
        ConfigurationError, match=r"backend is 'mkl'; it must be one of auto, reference, cpu"
    ):
        choose_backend("mkl", CPU, torch.float32)
    with pytest.raises(ConfigurationError, match=r"not torch.float32 on cuda"):
        choose_backend("cpu", torch.device("cuda"), torch.float32)


def test_a_compiler_that_fails_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYRAMIDSERVE_CACHE", str(tmp_path))
    monkeypatch.setenv("CC", "false")
    with pytest.raises(KernelBuildError, match="false"):
        load_library()
    assert not list(tmp_path.rglob("*.so"))


def test_kernels_are_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYRAMIDSERVE_CACHE", str(tmp_path))
    monkeypatch.setattr(build, "FLAGS", build.FLAGS.replace("-O3", "-O0"))  # compiles ten times as fast
    try:
        load_library()
    except KernelBuildError as error:
        pytest.skip(f"no native kernels here: {error}")

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("compiled again")

    monkeypatch.setattr(subprocess, "run", refuse)
    load_library()


def test_kv_has_the_type_that_is_asked_for_or_that_of_weights() -> None:
    assert choose_kv_dtype("auto", torch.bfloat16, 64) is torch.bfloat16
    assert choose_kv_dtype("float32", torch.bfloat16, 64) is torch.float32
    assert choose_kv_dtype("int8", torch.bfloat16, 64) is torch.int8
    assert choose_kv_dtype("int4", torch.float32, 64) is torch.uint8
    assert choose_kv_dtype("auto", torch.float32, 6) is torch.float32


@pytest.mark.parametrize(
    ("name", "head_size", "said"),
    [("int2", 64, "'int2'; it must be one of auto"), ("int8", 6, "multiple of 4")],
)
def test_kv_that_cannot_be_stored_so_is_refused(name: str, head_size: int, said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        choose_kv_dtype(name, torch.float32, head_size)
