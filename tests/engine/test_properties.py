"""Any sequence of operations, in any dtype: the weights are the dense oracle's, and the base returns to the bit.

The sequences are the same on every run; with SHIRA_EXAMPLES=300 in the environment the search is random.
"""

import functools
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch import Tensor, nn

from shira_diffusers import ShiraAdapter, ShiraError, load_adapter
from shira_diffusers.formats.shira_file import encode
from tests import reference, tiny

DEEP = int(os.environ.get("SHIRA_EXAMPLES", "0"))
SETTINGS = settings(
    max_examples=DEEP or 20,
    stateful_step_count=12,
    derandomize=not DEEP,
    phases=[Phase.generate, Phase.shrink] if DEEP else [Phase.generate],  # to shrink a failure takes minutes
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
NAMES = st.sampled_from(["a", "b", "c", "d"])
NUMBERS = st.sampled_from([1.0, 0.0, -1.0, 0.3, 2, 1.7])
BLOCKS = st.dictionaries(st.sampled_from(["down", "mid", "up"]), NUMBERS)
PARTS = st.fixed_dictionaries({}, optional={"unet": st.one_of(NUMBERS, BLOCKS), "text_encoder": NUMBERS})
SCALES = st.one_of(NUMBERS, PARTS)

Scales = Mapping[str, object]


def some_of(names: Iterable[str]) -> st.SearchStrategy[list[str]]:
    """Some of these names, in any order; none of none."""
    known = sorted(names)
    return st.lists(st.sampled_from(known), unique=True) if known else st.just([])


def fitting(scale: object, adapters: Iterable[ShiraAdapter]) -> object:
    """A strength without the components that one of the adapters lacks, which are refused."""
    if not isinstance(scale, Mapping):
        return scale
    lists = [adapter.component_names() for adapter in adapters]
    return {part: own for part, own in scale.items() if all(part in names for names in lists)}


@functools.cache
def pipeline(dtype: torch.dtype) -> StableDiffusionPipeline:
    """Made once: each sequence must leave it as it found it, which is what is tested."""
    return tiny.pipeline(dtype)


@functools.cache
def adapters() -> tuple[ShiraAdapter, ...]:
    """They overlap in part: other weights, other densities, other dtypes, one for the UNet alone."""
    pipe = tiny.pipeline()
    return (
        tiny.adapter_for(pipe, 1, only=("to_q", "q_proj", "conv_in")),
        tiny.adapter_for(pipe, 2, only=("attn1.to_q", "attn1.to_k", "fc1", "conv_in"), dtype=torch.float16),
        tiny.adapter_for(
            pipe,
            3,
            only=("attn2.to_q", "attn1.to_k", "resnets.0.conv1"),
            dtype=torch.bfloat16,
            components=("unet",),
            density=0.5,
        ),
    )


def parameters(pipe: StableDiffusionPipeline) -> dict[str, nn.Parameter]:
    return {f"{part}.{n}": p for part, m in tiny.modules_of(pipe).items() for n, p in m.named_parameters()}


class Sequences(RuleBasedStateMachine):
    """Operations on a pipeline beside a model of what they mean: loaded adapters, the mix, the mix put aside."""

    dtype = torch.float32

    @initialize()
    def begin(self) -> None:
        self.pipe = pipeline(self.dtype)
        self.parameters = parameters(self.pipe)
        self.base = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        self.addresses = {name: parameter.data_ptr() for name, parameter in self.parameters.items()}
        self.adapted = {name for adapter in adapters() for name in adapter.deltas}
        self.loaded: dict[str, ShiraAdapter] = {}
        self.mix: dict[str, object] = {}
        self.aside: dict[str, object] | None = None
        self.load("a", 0, 1.0, True)
        self.load("b", 1, 1.0, False)

    def known(self, scales: Scales) -> dict[str, object]:
        return {name: scale for name, scale in scales.items() if name in self.loaded}

    def assert_weights(self, expected: Mapping[str, Tensor], unchanged: Iterable[str]) -> None:
        wrong = [name for name in expected if not tiny.same_bits(self.parameters[name], expected[name])]
        wrong += [name for name in unchanged if not tiny.same_bits(self.parameters[name], self.base[name])]
        assert not wrong

    @invariant()
    def the_weights_are_those_of_the_oracle(self) -> None:
        touched = {name for active in self.mix for name in self.loaded[active].deltas}
        expected = reference.apply({name: self.base[name] for name in touched}, self.loaded, self.mix)
        self.assert_weights(expected, self.adapted - touched)

    @invariant()
    def the_pipeline_tells_what_is_loaded_and_active(self) -> None:
        assert self.pipe.get_active_shira() == self.mix
        parts = {name: adapter.component_names() for name, adapter in self.loaded.items()}
        assert {name: sorted(found) for name, found in self.pipe.list_shira().items()} == parts

    # ---------------------------------------------------------------- operations

    @rule(name=NAMES, which=st.integers(0, 2), scale=SCALES, activate=st.booleans())
    def load(self, name: str, which: int, scale: object, activate: bool) -> None:
        state = encode(adapters()[which])[0]
        if name in self.loaded:
            with pytest.raises(ValueError, match="in use"):
                self.pipe.load_shira(state, name, scale=scale, activate=activate)
            return
        scale = fitting(scale, [adapters()[which]])
        with nullcontext() if activate or scale == 1.0 else pytest.warns(UserWarning, match="has no effect"):
            self.pipe.load_shira(state, name, scale=scale, activate=activate)
        self.loaded[name] = adapters()[which]
        if activate:
            self.mix, self.aside = {name: scale}, None

    @rule(data=st.data())
    def set_mix(self, data: st.DataObject) -> None:
        names = data.draw(some_of(self.loaded))
        weights = data.draw(st.one_of(st.none(), SCALES, st.lists(SCALES, min_size=len(names), max_size=len(names))))
        if isinstance(weights, list):
            weights = [fitting(one, [self.loaded[name]]) for one, name in zip(weights, names, strict=True)]
        else:
            weights = fitting(weights, [self.loaded[name] for name in names])
        self.pipe.set_shira(names, weights)
        each = weights if isinstance(weights, list) else [1.0 if weights is None else weights] * len(names)
        self.mix, self.aside = dict(zip(names, each, strict=True)), None

    @rule(names=st.lists(NAMES, unique=True), verb=st.sampled_from(["set_shira", "delete_shira"]))
    def name_what_is_not_loaded(self, names: list[str], verb: str) -> None:
        with pytest.raises(ShiraError, match=r"no adapter named .*'nobody', loaded are"):
            getattr(self.pipe, verb)([*names, "nobody"])

    @precondition(lambda self: self.mix)
    @rule(name=NAMES)
    def fuse_to_a_file_and_load_that(self, name: str) -> None:
        if name in self.loaded:
            return
        mixed = {key: parameter.detach().clone() for key, parameter in self.parameters.items()}
        with tempfile.TemporaryDirectory() as folder:
            self.pipe.save_shira(folder)
            self.pipe.load_shira(folder, name)
            self.loaded[name] = load_adapter(Path(folder))
        self.assert_weights(mixed, ())
        self.mix, self.aside = {name: 1.0}, None

    @rule(data=st.data())
    def delete(self, data: st.DataObject) -> None:
        names = data.draw(some_of(self.loaded))
        self.pipe.delete_shira(names)
        for name in names:
            del self.loaded[name]
        self.mix = self.known(self.mix)
        self.aside = None if self.aside is None else self.known(self.aside)

    @rule(verb=st.sampled_from(["disable", "enable", "enable", "unload"]))
    def put_aside(self, verb: str) -> None:
        getattr(self.pipe, f"{verb}_shira")()
        kept = self.mix if self.aside is None else self.aside
        if verb == "disable":
            self.mix, self.aside = {}, kept
        elif verb == "enable":
            self.mix, self.aside = kept, None
        else:
            self.loaded, self.mix, self.aside = {}, {}, None

    @rule(data=st.data(), inside=st.sampled_from(["", "set_mix", "delete", "disable", "enable", "unload", "load"]))
    def use_for_a_while(self, data: st.DataObject, inside: str) -> None:
        """A block in which something else happens, and which then raises."""
        names = data.draw(some_of(self.loaded))
        scale = fitting(data.draw(SCALES), [self.loaded[name] for name in names])
        before, aside = self.mix, self.aside
        with pytest.raises(KeyboardInterrupt), self.pipe.shira(names, scale):
            self.mix, self.aside = dict.fromkeys(names, scale), None
            self.the_weights_are_those_of_the_oracle()
            if inside in ("set_mix", "delete"):
                getattr(self, inside)(data)
            elif inside == "load":
                self.load(data.draw(NAMES), 2, scale, True)
            elif inside:
                self.put_aside(inside)
            self.the_weights_are_those_of_the_oracle()
            raise KeyboardInterrupt
        self.mix, self.aside = self.known(before), None if aside is None else self.known(aside)

    @rule(data=st.data(), meanwhile=st.sampled_from(["delete", "use_for_a_while", "disable"]))
    def put_aside_and_bring_back(self, data: st.DataObject, meanwhile: str) -> None:
        self.put_aside("disable")
        if meanwhile == "delete":
            self.delete(data)
        elif meanwhile == "disable":
            self.put_aside("disable")
        else:
            self.use_for_a_while(data, "")
        self.the_weights_are_those_of_the_oracle()
        self.put_aside("enable")

    def teardown(self) -> None:
        """Both ways back to the base: all parameters, adapted or not, and where they lie."""
        try:
            self.pipe.disable_shira()
            self.assert_weights({}, self.base)
            self.pipe.unload_shira()
            self.assert_weights({}, self.base)
            assert self.pipe.list_shira() == {}
            now = parameters(self.pipe)
            assert all(now[name] is parameter for name, parameter in self.parameters.items())
            assert {name: parameter.data_ptr() for name, parameter in now.items()} == self.addresses
        except BaseException:
            pipeline.cache_clear()
            raise


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors of a few hundred entries gain nothing from threads, and lose much on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_any_sequence_of_operations(dtype: torch.dtype) -> None:
    machine = type(f"Sequences{dtype}", (Sequences,), {"dtype": dtype})
    run_state_machine_as_test(machine, settings=SETTINGS)
    tiny.assert_same_bits(pipeline(dtype), tiny.snapshot(tiny.pipeline(dtype)))
