"""Trained ONNX graphs whose squeeze-and-excitation something else computes; onnxruntime computes the rest."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnkern.functional import squeeze_excite


@dataclass(frozen=True)
class Block:
    """Squeeze-and-excitation as a graph spells it, from the map ``x`` to the map ``y``."""

    x: str
    y: str
    nodes: list[Any]
    mlp: tuple[Tensor, ...]  # w1, b1, w2, b2
    slope: float
    offset: float
    apply: str

    def double(self) -> Block:
        return replace(self, mlp=tuple(t.double() for t in self.mlp))


Gate = Callable[[Block, Tensor], Tensor]


def eager(block: Block, x: Tensor) -> Tensor:
    w1, b1, w2, b2 = block.mlp
    h = F.conv2d(x.mean((2, 3), keepdim=True), w1, b1).relu()
    s = (block.slope * F.conv2d(h, w2, b2) + block.offset).clamp(0, 1)
    return x * s if block.apply == "scale" else x + x * s


def ours(block: Block, x: Tensor, impl: str = "auto") -> Tensor:
    gate = {"gate": "hard_sigmoid", "gate_slope": block.slope, "gate_offset": block.offset}
    return squeeze_excite(x, *block.mlp, apply=block.apply, impl=impl, **gate)


class Graph:
    """An ONNX file: its squeeze-and-excitation blocks, and parts of it as onnxruntime's sessions."""

    def __init__(self, content: bytes):
        import onnx

        self.model = onnx.load_from_string(content)
        graph = self.model.graph
        self.input, self.output = graph.input[0].name, graph.output[0].name
        self.nodes = list(graph.node)
        self.users = collections.defaultdict(list)
        for node in self.nodes:
            for value in node.input:
                self.users[value].append(node)
        # nodes that depend on nothing that is fed in, by the value they make
        self.constants: dict[str, Any] = {}
        for node in self.nodes:
            if all(value in self.constants for value in node.input):
                self.constants |= dict.fromkeys(node.output, node)
        inferred = onnx.shape_inference.infer_shapes(self.model).graph.value_info
        self.types = {value.name: value.type.tensor_type.elem_type for value in inferred}
        pools = [node for node in self.nodes if node.op_type == "GlobalAveragePool"]
        self.blocks = [block for block in map(self._block, pools) if block]

    def _block(self, pool: Any) -> Block | None:
        """The block that begins with this mean, if one does."""
        nodes, weights, slope = [pool], [], {}
        for kind in ("Conv", "Relu", "Conv", "HardSigmoid", "Mul"):
            if not (node := self._only_user(nodes[-1], kind)):
                return None
            nodes.append(node)
            if kind == "HardSigmoid":
                slope = {a.name: a.f for a in node.attribute}
            if kind == "Conv":
                bias = node.input[2] if len(node.input) > 2 else None
                if not bias and (added := self._only_user(node, "Add")):
                    nodes.append(added)
                    bias = next(v for v in added.input if v in self.constants)
                weights += [self._array(node.input[1]), self._array(bias).flatten()]
        x, product = pool.input[0], nodes[-1]
        if x not in product.input:
            return None
        again = self._only_user(product, "Add")
        if again and x in again.input:
            nodes.append(again)
        apply = "scale" if nodes[-1] is product else "scale1p"
        made = nodes[-1].output[0]
        return Block(x, made, nodes, tuple(weights), slope["alpha"], slope["beta"], apply)

    def _only_user(self, node: Any, kind: str) -> Any:
        users = self.users[node.output[0]]
        return users[0] if len(users) == 1 and users[0].op_type == kind else None

    def _array(self, value: str) -> Tensor:
        from onnx import numpy_helper

        node = self.constants[value]
        if node.op_type in ("Reshape", "Identity"):
            return self._array(node.input[0])
        return torch.from_numpy(numpy_helper.to_array(node.attribute[0].t).copy())

    def part(self, nodes: list[Any], inputs: Iterable[str], outputs: Iterable[str]) -> Session:
        """These nodes and the constants that they need, as a network of its own."""
        from onnx import TensorProto, helper

        needed, open_values = {}, [value for node in nodes for value in node.input]
        while open_values:
            value = open_values.pop()
            if value in self.constants and value not in needed:
                needed[value] = node = self.constants[value]
                open_values += node.input
        stored = [node for node in self.nodes if node.output[0] in needed]
        inputs, outputs = (
            [
                helper.make_tensor_value_info(v, self.types.get(v, TensorProto.FLOAT), None)
                for v in values
            ]
            for values in (inputs, outputs)
        )
        graph = helper.make_graph([*stored, *nodes], "part", inputs, outputs)
        model = helper.make_model(
            graph, opset_imports=self.model.opset_import, ir_version=self.model.ir_version
        )
        return Session(model.SerializeToString())

    def metadata(self, key: str) -> str:
        return next(p.value for p in self.model.metadata_props if p.key == key)

    def whole(self, optimised: bool = True) -> Session:
        return Session(self.model.SerializeToString(), optimised)

    def block_alone(self, block: Block) -> Session:
        return self.part(block.nodes, [block.x], [block.y])


class Session:
    """A network in onnxruntime."""

    def __init__(self, content: bytes, optimised: bool = True):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        level = onnxruntime.GraphOptimizationLevel
        options.graph_optimization_level = (
            level.ORT_ENABLE_ALL if optimised else level.ORT_DISABLE_ALL
        )
        self.session = onnxruntime.InferenceSession(
            content, options, providers=["CPUExecutionProvider"]
        )
        self.inputs = [value.name for value in self.session.get_inputs()]
        self.outputs = [value.name for value in self.session.get_outputs()]

    def among(self, values: dict[str, Tensor]) -> None:
        """Adds what it makes of some of the values to them."""
        made = self.session.run(None, {name: values[name].numpy() for name in self.inputs})
        values.update(zip(self.outputs, map(torch.from_numpy, made), strict=True))

    def __call__(self, x: Tensor) -> Tensor:
        values = {self.inputs[0]: x.contiguous()}
        self.among(values)
        return values[self.outputs[0]]


class Cut:
    """A graph without its blocks: stages in onnxruntime, and between them the gates it is given.

    A value's stage is the number of blocks on the longest way to it.
    """

    def __init__(self, graph: Graph):
        self.graph = graph
        inside = {node.output[0]: block for block in graph.blocks for node in block.nodes}
        stage = dict.fromkeys(graph.constants, -1) | {graph.input: 0, "": -1}
        members = collections.defaultdict(list)
        for node in graph.nodes:
            block = inside.get(node.output[0])
            if block:
                stage[block.y] = stage[block.x] + 1
            elif node.output[0] not in graph.constants:
                at = max(stage[value] for value in node.input)
                stage |= dict.fromkeys(node.output, at)
                members[at].append(node)
        wanted = {graph.output, *(block.x for block in graph.blocks)}
        self.stages = []
        for at in range(max(stage.values()) + 1):
            nodes = members[at]
            made = {value for node in nodes for value in node.output}
            taken = {v for node in nodes for v in node.input if stage[v] >= 0} - made
            later = {v for n in graph.nodes if n.output[0] not in made for v in n.input} | wanted
            session = graph.part(nodes, sorted(taken), sorted(made & later)) if nodes else None
            self.stages.append((session, [b for b in graph.blocks if stage[b.x] == at]))

    def __call__(self, x: Tensor, gate: Gate) -> Tensor:
        values = {self.graph.input: x.contiguous()}
        for session, blocks in self.stages:
            if session:
                session.among(values)
            for block in blocks:
                values[block.y] = gate(block, values[block.x])
        return values[self.graph.output]
