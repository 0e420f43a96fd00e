"""`LatticeState`: what it holds, its file, and what chains refuse."""

from __future__ import annotations

import json
import os
import random
import re
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import DEVICE, DTYPES, latents, tiny_chain
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_exact import exact_chain

import doodl_fast
from doodl_fast.chain.exact.state import LatticeState


@pytest.fixture
def state() -> LatticeState:
    chain = exact_chain(5)
    return chain.forward_state(chain.state(*latents(2, 3, 4, dtype=torch.float32)))


def test_what_it_is(state):
    assert doodl_fast.LatticeState is LatticeState
    assert repr(state) == "LatticeState((2, 3, 4) int32, end='image', 4 words)"
    assert state.x.dtype == torch.int32 and state.x_buffer.shape == (4, 2, 3, 4)
    assert state.units == (2.0**-22, 2.0**-22)


@pytest.mark.parametrize("dtype", DTYPES)
def test_latents_come_back_in_their_dtype(dtype):
    x, y = latents(1, 3, 4, dtype=DTYPES[dtype])
    for arithmetic in ("exact", "exact64"):
        for got, want in zip(
            exact_chain(3, arithmetic=arithmetic).state(x, y, end="image").latents(), (x, y), strict=True
        ):
            assert got.dtype == want.dtype and got.data_ptr() != want.data_ptr()
            # The error is at most half a unit of the lattice, and for narrow dtypes there is none.
            assert (got.double() - want.double()).abs().max() <= (2.0**-23 if arithmetic == "exact" else 2.0**-37)
            assert dtype in ("fp32", "fp64") or torch.equal(got, want)


def test_a_tied_start_and_a_strided_one():
    chain = exact_chain(3)
    x = latents(2, 3, 4, 5, dtype=torch.float32)[0].to(memory_format=torch.channels_last)
    tied = chain.state(x)
    assert torch.equal(tied.x, tied.y) and tied.x.is_contiguous()
    assert tied.equals(chain.state(x.contiguous(), x.contiguous()))


def test_equality_is_of_every_bit(state):
    assert state.equals(state) and state.equals(state.with_words(9)) and state.with_words(9).equals(state)
    for name in ("x", "y", "x_buffer", "y_buffer"):
        changed = getattr(state, name).clone()
        changed.view(-1)[-1] += 1
        assert not state.equals(replace(state, **{name: changed}))
    assert not state.equals(replace(state, end="noise"))
    assert not state.equals(replace(state, fingerprint="another"))
    assert not state.equals(replace(state, latents_dtype=torch.float16))
    assert not state.equals(replace(state, **{name: getattr(state, name)[..., :1] for name in ("x", "y")}))
    with pytest.raises(TypeError, match="other: expected a LatticeState, got Tensor"):
        state.equals(state.x)


@pytest.mark.parametrize("arithmetic", ["exact", "exact64"])
def test_a_saved_state_goes_on(tmp_path, arithmetic):
    chain = exact_chain(6, arithmetic=arithmetic)
    start = chain.state(*latents(1, 3, 4, dtype=torch.bfloat16))
    reached = chain.forward_state(start)
    reached.save(tmp_path / "state.safetensors")
    loaded = LatticeState.load(tmp_path / "state.safetensors").to(DEVICE)
    assert loaded.equals(reached) and loaded.units == reached.units and loaded.latents_dtype == torch.bfloat16
    assert exact_chain(6, arithmetic=arithmetic).inverse_state(loaded).equals(start)


def test_another_prompt_is_not_another_lattice(state):
    chain = exact_chain(5, guidance_scale=1.0)
    assert chain.inverse_state(state).end == "noise"


def test_states_carry_no_gradient_and_leave_the_callers_tensors_alone():
    chain = exact_chain(3)
    x, y = latents(1, 3, 4, grad=True)
    state = chain.state(x, y)
    before = [t.clone() for t in state.tensors()]
    chain.forward_state(state)
    assert all(torch.equal(a, b) for a, b in zip(state.tensors(), before, strict=True))
    assert not any(latent.requires_grad for latent in state.latents())
    assert state.to(DEVICE).equals(state)


def test_what_chains_refuse(state):
    chain = exact_chain(5)
    with pytest.raises(
        ValueError, match=r"expected one at the noise's end, got one at the image's; use chain.inverse_state"
    ):
        chain.forward_state(state)
    with pytest.raises(ValueError, match=r"expected one at the image's end, .* use chain.forward_state"):
        chain.inverse_state(chain.inverse_state(state))
    with pytest.raises(TypeError, match=r"state: expected a LatticeState, got Tensor; use chain.state\(x, y\)"):
        chain.forward_state(state.x)
    others = [
        exact_chain(6),
        exact_chain(5, mix_weight=0.94),
        exact_chain(5, arithmetic="exact64"),
        exact_chain(5, prediction_type="v_prediction"),
        exact_chain(5, state_dtype=torch.float32),
    ]
    for other in others:
        with pytest.raises(ValueError, match="another schedule, mix_weight, state_dtype or arithmetic"):
            other.inverse_state(state)
    plain = tiny_chain(5)
    for call in (lambda: plain.state(*latents(1, 3, 4)), lambda: plain.inverse_state(state)):
        with pytest.raises(
            ValueError, match=r'need exact arithmetic, and this chain has "float"; .*arithmetic="exact"'
        ):
            call()
    with pytest.raises(ValueError, match="end: expected one of 'noise', 'image', got 'middle'"):
        chain.state(*latents(1, 3, 4), end="middle")
    with pytest.raises(ValueError, match="x: expected finite latents"):
        chain.state(torch.full((1, 3), float("nan"), device=DEVICE))


def test_damaged_files(state, tmp_path):
    path = tmp_path / "state.safetensors"
    state.save(path)
    tensors = load_file(path)

    with safe_open(path, "pt") as file:
        metadata = file.metadata()

    def refused(match, tensors=tensors, **changes):
        save_file({k: v for k, v in tensors.items() if v is not None}, path, {**metadata, **changes})
        with pytest.raises(ValueError, match=match):
            LatticeState.load(path)

    refused("expected a doodl_fast.LatticeState of version 1, got weights of version 1", format="weights")
    refused("version 1, got doodl_fast.LatticeState of version 2", version="2")
    refused("damaged LatticeState: end: expected one of", end="middle")
    refused("damaged LatticeState: ", units="1.0")
    refused("damaged LatticeState: 'fp8'", latents_dtype="fp8")
    refused("expected the tensors x, y, x_buffer, y_buffer, got x", {**tensors, "y_buffer": None})
    refused("int32 or int64 alike", {**tensors, "y": tensors["y"].long()})
    refused("in the lattice's range", {**tensors, "x": torch.full_like(tensors["x"], -(2**31))})
    refused("buffers of int32 >= 0", {**tensors, "x_buffer": -1 - tensors["x_buffer"]})
    refused("buffers of int32 >= 0", {**tensors, "y_buffer": tensors["y_buffer"][:2]})
    path.write_bytes(b"no safetensors at all")
    with pytest.raises(ValueError, match="is not a safetensors file"):
        LatticeState.load(path)
    with pytest.raises(OSError, match="nowhere"):
        LatticeState.load(tmp_path / "nowhere")


def outcome(path, content: bytes, state: LatticeState) -> str:
    """Whether a file with that content is the same state, or is refused with one ValueError that names it."""
    path.write_bytes(content)
    try:
        loaded = LatticeState.load(path)
    except ValueError as error:
        return "refused" if type(error) is ValueError and str(error).startswith("path: ") else repr(error)
    return "the same" if loaded.equals(state) and loaded.units == state.units else "another state"


def test_every_flipped_bit_and_every_truncation_is_noticed(state, tmp_path):
    path, chance = tmp_path / "state.safetensors", random.Random(0)
    state.save(path)
    sound = path.read_bytes()
    assert outcome(path, sound, state) == "the same"
    for place in range(len(sound)):
        content = bytearray(sound)
        content[place] ^= 1 << chance.randrange(8)
        assert outcome(path, bytes(content), state) == "refused", place
    for length in [*range(0, len(sound), 7), len(sound) - 1]:
        assert outcome(path, sound[:length], state) == "refused", length
    assert outcome(path, sound + b"\0", state) == "refused"


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_several_changed_bytes_are_noticed(state, tmp_path, data):
    path = tmp_path / "state.safetensors"
    state.save(path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 5))):
        start = data.draw(st.integers(0, len(content)))
        end = data.draw(st.integers(start, min(len(content), start + 20)))
        content[start:end] = data.draw(st.binary(max_size=20))
    # Whitespace in the header may become other whitespace, for instance.
    assert outcome(path, bytes(content), state) in ("refused", "the same")


def test_a_changed_tensor_or_field_does_not_match_the_checksum(state, tmp_path):
    path = tmp_path / "state.safetensors"
    state.save(path)
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    for name, tensor in tensors.items():
        changed = tensor.clone()
        changed.view(-1)[-1] ^= 1
        for fields in (metadata, {**metadata, "fingerprint": "0" + metadata["fingerprint"][1:]}):
            save_file({**tensors, name: changed}, path, fields)
            with pytest.raises(ValueError, match="damaged LatticeState: its checksum does not match its content"):
                LatticeState.load(path)
    save_file(tensors, path, {name: text for name, text in metadata.items() if name != "checksum"})
    assert LatticeState.load(path).equals(state)  # Version 0.2 wrote no checksum.


ODD_METADATA = [
    {"units": "0x1p+99999 0x1p+0"},
    {"units": "nan 0x1p+0"},
    {"units": "0x0p+0 0x1p+0"},
    {"units": "0x1p+0 0x1p+0 0x1p+0"},
    {"units": ""},
    {"units": "one two"},
    {"latents_dtype": ""},
    {"end": "noise "},
    {"version": ""},
    {"another": "field"},
    {"fingerprint": None},
    {"end": None},
    {"units": None},
    {"format": None},
]


@pytest.mark.parametrize("changes", ODD_METADATA, ids=str)
def test_odd_metadata(state, tmp_path, changes):
    path = tmp_path / "state.safetensors"
    state.save(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    metadata.pop("checksum")  # Otherwise the checksum alone would give every change away.
    changed = {name: text for name, text in {**metadata, **changes}.items() if text is not None}
    save_file(load_file(path), path, changed)
    assert outcome(path, path.read_bytes(), state) == "refused"


ODD_SHAPES = [[], [24], [0], [2**63], [2**31, 2**31, 0], [-1], [2.5], ["2"], None, [24, 0], [1] * 99 + [24]]


@pytest.mark.parametrize(
    "dtype", ["I32", "I64", "I8", "U16", "U64", "BOOL", "BF16", "F64", "F8_E4M3", "F4", "C64", "x", 3]
)
def test_odd_tensors(state, tmp_path, dtype):
    """The headers are written by hand: any dtype and any shape for any tensor, over the same bytes."""
    path = tmp_path / "state.safetensors"
    state.save(path)
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header, body = json.loads(content[8 : 8 + length]), content[8 + length :]
    header["__metadata__"].pop("checksum")
    for name in ("x", "x_buffer", "y_buffer"):
        for shape in ODD_SHAPES:
            for size in ({}, {"data_offsets": [0, 0]}, {"data_offsets": [8, 0]}):
                odd = json.dumps({**header, name: {**header[name], "dtype": dtype, "shape": shape, **size}}).encode()
                assert outcome(path, struct.pack("<Q", len(odd)) + odd + body, state) == "refused", (name, shape, size)


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "empty").write_bytes(b"")
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(ValueError, match=r"path: expected a file, got .*, which is a folder or a device"):
            LatticeState.load(path)
    with pytest.raises(ValueError, match=r"is not a safetensors file \(it is empty\)"):
        LatticeState.load(tmp_path / "empty")


def test_states_that_were_saved_before_are_of_the_same_lattice(state):
    """The fingerprint was recorded with version 0.2."""
    recorded = "9007df89f8abdbfb476e7e96b709d0e5c2744bc6b3512488c33ba4ecf460e273 torch.float64"
    assert state.fingerprint == recorded


def test_a_pickle_is_not_read(tmp_path):
    torch.save({"x": torch.zeros(1)}, tmp_path / "state.safetensors")
    with pytest.raises(ValueError, match="is not a safetensors file"):
        LatticeState.load(tmp_path / "state.safetensors")


def test_the_example_of_the_docs(tmp_path, monkeypatch):
    text = (Path(__file__).parents[2] / "docs" / "exact.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    chain, names = exact_chain(5), {"doodl_fast": doodl_fast, "x0": latents(1, 3, 4, dtype=torch.float32)[0]}
    monkeypatch.chdir(tmp_path)
    exec(code, {**names, "denoiser": chain.denoiser, "schedule": chain.schedule})
    assert (tmp_path / "noise.safetensors").is_file()
