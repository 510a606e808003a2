"""Of several networks in a file, in containers or under prefixes, one is taken: that which its authors evaluate."""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor

Tensors = dict[str, Tensor]
_DEEPEST = 4  # containers in each other
# Words of a container's name or of a prefix, best first. What has none of them stands before the student's.
_AVERAGE = {"ema", "averaged", "average", "avg", "swa", "shadow"}
_TEACHER = {"teacher", "target"}
_MOCO = "base_encoder"  # of which MoCo's momentum encoder is the average, and which its authors evaluate
_MOMENTUM = {"momentum"}
_STUDENT = {"student"}
_NO_NETWORK = {"optimizer", "optim", "optimizers", "grad", "grads", "exp"}  # may be under the names of its weights
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")


def rank(place: str) -> tuple[int, int]:
    """Order containers and prefixes: an average, a teacher, MoCo's base, any other, a student; then the shortest."""
    words = _words(place)
    tests = (words & _AVERAGE, words & _TEACHER, _MOCO in place, words & _MOMENTUM, not words & _STUDENT)
    return next((number for number, found in enumerate(tests) if found), len(tests)), len(place)


def chosen(found: Mapping[str, Any], is_network: Callable[[Tensors], bool]) -> tuple[Tensors, tuple[str, ...]]:
    """Return the tensors of a container, without other values, and the keys that lead to it.

    It is the best, by `rank`, of those whose names satisfy `is_network`; without one, that with the most tensors.
    """
    containers = [*_containers(found, set())]
    if networks := [one for one in containers if is_network(one[0])]:
        return min(networks, key=lambda one: rank(".".join(one[1]))[0])
    return max(containers, key=lambda one: len(one[0]))


def _containers(
    found: Mapping[str, Any], seen: set[int], path: tuple[str, ...] = ()
) -> Iterator[tuple[Tensors, tuple[str, ...]]]:
    """Yield each container once, as `chosen` does one: a damaged file may hold one in itself."""
    seen.add(id(found))
    yield {key: value for key, value in found.items() if isinstance(key, str) and isinstance(value, Tensor)}, path
    for key, inner in found.items():
        if not (isinstance(inner, Mapping) and isinstance(key, str)) or id(inner) in seen:
            continue
        if len(path) < _DEEPEST and not _words(key) & _NO_NETWORK:
            yield from _containers(inner, seen, (*path, key))


def _words(place: str) -> set[str]:
    return {word.lower() for word in _WORD.findall(place)}
