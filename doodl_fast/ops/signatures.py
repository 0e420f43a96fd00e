"""The table of the ops: for each op its name, its arguments with their types, and its outputs.

Everything that must know an op's signature takes it from here: the schema that is registered with PyTorch
(`registration.py`), the eager and the Triton kernels, which get their arguments as a named tuple, and the names of the
native kernels. The C++ sources state the schemas of their kernels once more, because a library has to be complete in
itself; `tests/ops/test_signatures.py` compares the two.

An op and its kernel differ in one way: the op returns new tensors, while the kernel fills tensors that it is given.
A kernel therefore takes first the outputs, then the op's tensors, then the op's other arguments, each in the order of
the table. Arguments that only say which outputs are wanted, such as the dtype of an output, are not passed to it.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple


class Argument(NamedTuple):
    """An argument of an op: its type in PyTorch's schema language, such as `Tensor?` or `float`, and its name."""

    type: str
    name: str

    @property
    def is_tensor(self) -> bool:
        """Whether it is a tensor or an optional tensor."""
        return self.type.startswith("Tensor")

    @property
    def is_optional(self) -> bool:
        """Whether None may be given for it."""
        return self.type.endswith("?")

    @property
    def is_written(self) -> bool:
        """Whether the op writes into it, which a schema says by `Tensor(a!)`."""
        return "!" in self.type

    def written(self, letter: str) -> Argument:
        """Returns it as a tensor that is written into; a schema gives each such tensor a letter of its own."""
        return Argument(f"Tensor({letter}!)" + "?" * self.is_optional, self.name)


def parsed(text: str) -> tuple[Argument, ...]:
    """Returns the arguments in a text such as `"Tensor x, Tensor? eps, float a"`."""
    return tuple(Argument(*argument.rsplit(" ", 1)) for argument in text.split(", "))


def listed(arguments: tuple[Argument, ...]) -> str:
    """Returns the text of which `parsed` makes the arguments."""
    return ", ".join(f"{argument.type} {argument.name}" for argument in arguments)


@dataclass(frozen=True)
class Signature:
    """One row of the table.

    Attributes:
        name: The op's name: `torch.ops.doodl_fast.<name>`.
        arguments: The op's arguments in PyTorch's schema language. `Tensor(a!)` is a tensor that is written into.
        outputs: The tensors that a kernel fills and the op returns. An output of type `Tensor?` may be left out by a
            call; then the op returns a list of those that are there, as a schema knows no optional outputs.
        not_for_kernels: The names of arguments that only say which outputs are wanted, and in which dtype.
        native_devices: The types of devices for which the native backend has a kernel.
    """

    name: str
    arguments: str
    outputs: str
    not_for_kernels: tuple[str, ...] = ()
    native_devices: tuple[str, ...] = ("cpu", "cuda")

    @property
    def has_optional_outputs(self) -> bool:
        """Whether a call may leave out an output."""
        return any(output.is_optional for output in parsed(self.outputs))

    @property
    def written(self) -> tuple[str, ...]:
        """The names of the op's arguments that it writes into."""
        return tuple(argument.name for argument in parsed(self.arguments) if argument.is_written)

    @property
    def schema(self) -> str:
        """The op's schema, without its name."""
        outputs = parsed(self.outputs)
        several = "Tensor[]" if self.has_optional_outputs else f"({', '.join('Tensor' for _ in outputs)})"
        return f"({self.arguments}) -> {'Tensor' if len(outputs) == 1 else several}"

    @property
    def kernel_arguments(self) -> tuple[Argument, ...]:
        """The arguments of a kernel: outputs, tensors, other arguments."""
        passed = [argument for argument in parsed(self.arguments) if argument.name not in self.not_for_kernels]
        tensors = [argument for argument in passed if argument.is_tensor]
        others = [argument for argument in passed if not argument.is_tensor]
        letters = iter("abcdefgh")
        outputs = [output.written(next(letters)) for output in parsed(self.outputs)]
        tensors = [argument.written(next(letters)) if argument.is_written else argument for argument in tensors]
        return (*outputs, *tensors, *others)

    @property
    def kernel_schema(self) -> str:
        """The schema of a kernel, with its name, as PyTorch's dispatcher prints it."""
        return f"{self.name}({listed(self.kernel_arguments)}) -> ()"

    @cached_property
    def call(self) -> Callable[..., Any]:
        """A class of named tuples that hold the arguments of one call of the op."""
        return namedtuple("call", [argument.name for argument in parsed(self.arguments)])

    @cached_property
    def kernel_call(self) -> Callable[..., Any]:
        """A class of named tuples that hold the arguments of one call of a kernel."""
        return namedtuple("kernel_call", [argument.name for argument in self.kernel_arguments])

    def kernel(self, function: Callable[[Any], None]) -> Callable[..., None]:
        """Returns a kernel that packs its arguments into a `kernel_call` and passes it to a function."""
        pack = self.kernel_call
        return lambda *arguments: function(pack(*arguments))


_COEFFICIENTS = "float a, float c, float b, float? g"
_MIXING = "bool target_first, float a0, float c0, float a1, float c1"
_LATTICE = "float c, float b, float? g, bool undo"
_LATTICE_MIXING = "bool target_first, int by0, int over0, float c0, int by1, int over1, float c1"

COUPLING = Signature("coupling", f"Tensor target, Tensor? source, Tensor? eps, {_COEFFICIENTS}", "Tensor out")
COUPLING_VJP = Signature(
    "coupling_vjp",
    f"Tensor grad, {_COEFFICIENTS}, Tensor? scale, ScalarType? eps_dtype, bool want_source",
    "Tensor out, Tensor? out_source, Tensor? out_eps",
    not_for_kernels=("eps_dtype", "want_source"),
)
COUPLING_MIX = Signature(
    "coupling_mix",
    f"Tensor target, Tensor source, Tensor? eps, {_MIXING}, {_COEFFICIENTS}",
    "Tensor out_target, Tensor out_source",
)
COUPLING_MIX_VJP = Signature(
    "coupling_mix_vjp",
    f"Tensor grad_target, Tensor grad_source, {_MIXING}, {_COEFFICIENTS}, Tensor? scale, ScalarType? eps_dtype",
    "Tensor out_target, Tensor out_source, Tensor? out_eps",
    not_for_kernels=("eps_dtype",),
)
LATENT_UPDATE = Signature(
    "latent_update",
    "Tensor x, Tensor y, Tensor mx, Tensor my, Tensor gx, Tensor gy, Tensor? noise, Tensor? starts, "
    "float rate, float clip, float momentum, bool nesterov, bool tied, float sigma",
    "Tensor out_x, Tensor out_y, Tensor out_mx, Tensor out_my",
)
LATTICE_COUPLING = Signature(
    "lattice_coupling",
    f"Tensor target, Tensor source, Tensor? eps, Tensor(a!) faults, int row, {_LATTICE}",
    "Tensor out",
)
LATTICE_MIX = Signature(
    "lattice_mix",
    "Tensor target, Tensor source, Tensor target_buffer, Tensor source_buffer, Tensor? eps, Tensor(a!) faults, "
    f"int row, {_LATTICE_MIXING}, {_LATTICE}",
    "Tensor out_target, Tensor out_source, Tensor out_target_buffer, Tensor out_source_buffer",
)

GROUP_NORM_SILU = Signature(
    "group_norm_silu",
    "Tensor x, Tensor? weight, Tensor? bias, int num_groups, float eps, bool silu",
    "Tensor y, Tensor mean, Tensor rstd",
    native_devices=("cpu",),
)
GROUP_NORM_SILU_BACKWARD = Signature(
    "group_norm_silu_backward",
    "Tensor grad_y, Tensor x, Tensor mean, Tensor rstd, Tensor? weight, Tensor? bias, int num_groups, bool silu",
    "Tensor grad_x",
    native_devices=("cpu",),
)

GATED_ACTIVATION = Signature("gated_activation", "Tensor x, int activation", "Tensor y", native_devices=("cpu",))
GATED_ACTIVATION_BACKWARD = Signature(
    "gated_activation_backward", "Tensor grad_y, Tensor x, int activation", "Tensor grad_x", native_devices=("cpu",)
)

QUICK_GELU = Signature("quick_gelu", "Tensor x", "Tensor y", native_devices=("cpu",))
QUICK_GELU_BACKWARD = Signature(
    "quick_gelu_backward", "Tensor grad_y, Tensor x", "Tensor grad_x", native_devices=("cpu",)
)

MODULATED_NORM = Signature(
    "modulated_norm",
    "Tensor x, Tensor? weight, Tensor? bias, Tensor? scale, Tensor? shift, float eps, bool center",
    "Tensor y, Tensor mean, Tensor rstd",
    native_devices=("cpu",),
)
MODULATED_NORM_BACKWARD = Signature(
    "modulated_norm_backward",
    "Tensor grad_y, Tensor x, Tensor mean, Tensor rstd, Tensor? weight, Tensor? scale, bool center",
    "Tensor grad_x",
    native_devices=("cpu",),
)

ROTARY_EMBEDDING = Signature(
    "rotary_embedding", "Tensor x, Tensor cos, Tensor sin, int pairs", "Tensor y", native_devices=("cpu",)
)
ROTARY_EMBEDDING_BACKWARD = Signature(
    "rotary_embedding_backward",
    "Tensor grad_y, Tensor cos, Tensor sin, int pairs",
    "Tensor grad_x",
    native_devices=("cpu",),
)

LATENT_OPS = (COUPLING, COUPLING_VJP, COUPLING_MIX, COUPLING_MIX_VJP, LATENT_UPDATE, LATTICE_COUPLING, LATTICE_MIX)
"""The ops on latents."""

LAYER_OPS = (
    *(GROUP_NORM_SILU, GROUP_NORM_SILU_BACKWARD, GATED_ACTIVATION, GATED_ACTIVATION_BACKWARD),
    *(MODULATED_NORM, MODULATED_NORM_BACKWARD, ROTARY_EMBEDDING, ROTARY_EMBEDDING_BACKWARD),
    *(QUICK_GELU, QUICK_GELU_BACKWARD),
)
"""The ops that compute layers of frozen networks, and the gradients of these layers' inputs."""

TABLE = (*LATENT_OPS, *LAYER_OPS)
"""All ops. Every backend has a kernel of each, the native one for the devices that the row names."""
