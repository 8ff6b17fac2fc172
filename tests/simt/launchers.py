"""What the operators of this folder share: launchers built for the emulator, called on tensors in its memory."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import run as simt
import torch
from torch import Tensor

# the order of the enumerators in csrc
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass
class Launchers:
    """The operators of a folder of csrc/ops on the emulated device.

    ``force`` are the fields of plan.h's Force; None calls the launchers of params.h, which plan by
    themselves.  ``plans`` lists what ran.
    """

    library: ctypes.CDLL
    device: simt.Device
    force: dict[str, int] | None = field(default_factory=dict)
    plans: list[Any] = field(default_factory=list)

    folder: ClassVar[str]
    sources: ClassVar[tuple[str, ...]]
    """Of the folder; tests/simt/<folder>.cpp makes C functions of their launchers."""
    prefix: ClassVar[str]
    names: ClassVar[tuple[str, ...]]
    """Of the C functions, after the prefix."""
    mirrors: ClassVar[tuple[Any, ...]]
    """The structs whose sizes ``<prefix>_sizes`` gives, in its order."""

    @classmethod
    def build(cls) -> Any:
        own = (f"csrc/ops/{cls.folder}/{name}" for name in cls.sources)
        library = simt.build(cls.folder, f"tests/simt/{cls.folder}.cpp", *own)
        for name in cls.names:
            getattr(library, f"{cls.prefix}_{name}").restype = ctypes.c_char_p
        sizes = (ctypes.c_size_t * len(cls.mirrors))()
        getattr(library, f"{cls.prefix}_sizes")(sizes)
        mirrored = [ctypes.sizeof(struct) for struct in cls.mirrors]
        assert list(sizes) == mirrored, "the structs here no longer mirror params.h and plan.h"
        return cls(library, simt.Device(library))

    def upload(self, t: Tensor | None, name: str) -> int | None:
        return None if t is None or t.numel() == 0 else self.device.upload(t, name)

    def planned(self, force: Any, plan: Any) -> tuple[Any, Any]:
        """What a launcher takes after its params where plan.h's structs are ``force`` and ``plan``."""
        self.plans.append(plan())
        given = None if self.force is None else ctypes.byref(force(**self.force))
        return given, ctypes.byref(self.plans[-1])

    def call(
        self,
        name: str,
        p: Any,
        outputs: dict[str, Tensor],
        strided: dict[str, Callable[[int, Tensor], Any]],
        *arguments: Any,
    ) -> None:
        """Launch with memory for each output; ``strided`` makes p's field of some, with their strides."""
        addresses = {
            output: self.device.empty(t.numel() * t.element_size(), output)
            for output, t in outputs.items()
            if t.numel()
        }
        for output, address in addresses.items():
            place = strided.get(output)
            setattr(p, output, place(address, outputs[output]) if place else address)
        message = getattr(self.library, f"{self.prefix}_{name}")(ctypes.byref(p), *arguments)
        try:
            assert message is None, f"{self.folder} {name}: {message.decode()}"
            for output, address in addresses.items():
                self.device.download(outputs[output], address, output)
        finally:
            self.device.release()
