"""The weights of one part of a model, for one version after the other, from inputs that are read once for all."""

from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from perta_fast.arrays import ByteArray, widen
from perta_fast.checkpoints.safetensors_file import TensorEntry
from perta_fast.dtypes import ITEM_SIZES, torch_dtype
from perta_fast.streaming.forward.version import Version
from perta_fast.streaming.model.skeleton import Skeleton
from perta_fast.subtraction.compute import Chunk, MadeArrays, Statistics, Subtraction, chunk_elements, chunks_of
from perta_fast.subtraction.held_inputs import Arena, HeldInputs
from perta_fast.subtraction.inputs import Sources
from perta_fast.subtraction.matching import TensorMatch

_CHUNK = 1 << 20  # elements, where no input is copied to buffers: fewer calls cost less


class PartWeights:
    """Holds the inputs of one part, and one changed copy of it; that is in float32 if the model runs in that.

    The values that it gives share memory with both, so they are valid until the next call.
    """

    def __init__(self, skeleton: Skeleton, versions: Sequence[Version], threads: int) -> None:
        self._skeleton, self._versions, self._threads = skeleton, versions, threads
        self._inputs, self._copy = HeldInputs(), Arena()
        self._sources = {id(version.sources): version.sources for version in versions if version.sources is not None}
        self._matches = {key: _by_name(sources) for key, sources in self._sources.items()}
        self._chunk = {key: _chunk_of(sources, threads) for key, sources in self._sources.items()}
        self._stored: list[str] = []
        self._plain: dict[str, torch.dtype] = {}  # of these, those that are parameters as they are
        self._widened: set[str] = set()  # of these, those that the model has in float32, and are narrower
        self._converted: dict[str, Tensor] = {}  # used again: new memory costs more than the conversion
        self._made: dict[int, MadeArrays] = {}

    def inputs_of(self, parameters: Iterable[str]) -> list[TensorEntry]:
        """What lies in files for these parameters: of the model, and what the versions subtract."""
        entries = []
        for name in self._skeleton.weights.needed(parameters):
            entries.append(self._skeleton.checkpoint.tensors[name])
            for key, sources in self._sources.items():
                if (found := self._matches[key].get(name)) is not None:
                    entries += [entry for operand, _, entry in sources.operands(found[1]) if operand]
        return entries

    def hold(self, parameters: Sequence[str]) -> None:
        """Read the inputs of a part. Raises RunError, naming file and tensor, if that fails."""
        self._inputs.hold(self.inputs_of(parameters), self._threads)
        self._stored, self._converted = self._skeleton.weights.needed(parameters), {}
        self._plain, tensors = self._skeleton.weights.plain(parameters), self._skeleton.checkpoint.tensors
        wide = [name for name, dtype in self._plain.items() if dtype == torch.float32]
        self._widened = {name for name in wide if tensors[name].dtype in ("BF16", "F16")}
        self._made = {key: MadeArrays(sources, len(self._stored)) for key, sources in self._sources.items()}

    def of(self, version: Version, parameters: Sequence[str]) -> tuple[dict[str, Tensor], dict[str, int]]:
        """The values of parameters of the part that is held; and by stored tensor, how many elements differ.

        Raises NotFiniteError, naming the tensor, if a value is not finite.
        """
        copies, changed = self._subtracted(version)
        tensors = self._skeleton.checkpoint.tensors

        def tensor(name: str, dtype: torch.dtype) -> Tensor:
            value = copies.get(name)
            if value is None:
                held = self._inputs.find(tensors[name])
                assert held is not None
                value = _as_tensor(held, tensors[name])
            if value.dtype == dtype:
                return value
            if name not in self._plain:  # it is joined with others, and not kept beside the result
                return value.to(dtype)
            return self._converted_to(name, dtype).copy_(value)

        return self._skeleton.weights.made_of(parameters, tensor), changed

    def _converted_to(self, name: str, dtype: torch.dtype) -> Tensor:
        """Memory for a parameter in another type than it is stored in."""
        if name not in self._converted:
            self._converted[name] = torch.empty(self._skeleton.checkpoint.tensors[name].shape, dtype=dtype)
        return self._converted[name]

    def _subtracted(self, version: Version) -> tuple[dict[str, Tensor], dict[str, int]]:
        """The tensors that a version changes, and how many elements of each differ."""
        if version.sources is None or version.rescaling is None:
            return {}, {}
        matches, by_name = version.sources.matches, self._matches[id(version.sources)]
        numbers = [by_name[name][0] for name in self._stored if name in by_name]
        wide = {
            k: self._converted_to(matches[k].theta.name, torch.float32)
            for k in numbers
            if matches[k].theta.name in self._widened
        }
        narrow = [k for k in numbers if k not in wide]
        arrays = dict(zip(narrow, self._copy.arrays(matches[k].theta.size for k in narrow), strict=True))
        floats = {k: tensor.view(-1).numpy() for k, tensor in wide.items()}
        counts: list[tuple[str, int]] = []  # of each chunk; threads append to it

        def place(chunk: Chunk) -> "ByteArray | None":
            if chunk.index in wide:
                return None
            size = ITEM_SIZES[matches[chunk.index].theta.dtype]
            return arrays[chunk.index][chunk.begin * size : (chunk.begin + chunk.count) * size]

        def store(chunk: Chunk, data: memoryview, statistics: Statistics) -> None:
            theta = matches[chunk.index].theta
            if chunk.index in wide:
                widen(data, theta.dtype, floats[chunk.index][chunk.begin : chunk.begin + chunk.count])
            counts.append((theta.name, int(statistics.get("changed", 0))))

        subtraction = Subtraction(
            version.sources,
            version.rescaling,
            self._threads,
            self._chunk[id(version.sources)],
            inputs=self._inputs,
            made=self._made[id(version.sources)],
            place=place,
        )
        chunks = chunks_of([(k, matches[k]) for k in numbers], subtraction.chunk)
        subtraction.run(chunks, store, lambda moved: None)
        changed: Counter[str] = Counter()
        for name, count in counts:
            changed[name] += count
        copies = wide | {k: _as_tensor(array, matches[k].theta) for k, array in arrays.items()}
        return {matches[k].theta.name: tensor for k, tensor in copies.items()}, changed


def _as_tensor(held: ByteArray, entry: TensorEntry) -> Tensor:
    return torch.frombuffer(held, dtype=torch_dtype(entry.dtype)).view(entry.shape)


def _chunk_of(sources: Sources, threads: int) -> int:
    """The size of a chunk, in elements. Those of a tensor that lies in several places are put together in buffers."""
    pieced = any(entry.pieces for match in sources.matches for _, _, entry in sources.operands(match))
    return chunk_elements(threads) if pieced else _CHUNK


def _by_name(sources: Sources) -> dict[str, tuple[int, TensorMatch]]:
    """The matches that are subtracted from, with their numbers, by the name of the model's tensor."""
    numbered = enumerate(sources.matches)
    return {match.theta.name: (number, match) for number, match in numbered if match.copied is None}
