"""YAML text -> plain values, within bounds: a few bytes of aliases can stand for billions of values.

In: the text of a settings file or of one override. Out: dictionaries, lists, texts, numbers.
"""

from typing import Any

import yaml

MOST_CHARACTERS = 2**20  # a run has some hundred settings
MOST_VALUES = 10_000
MOST_LEVELS = 50


class YamlError(ValueError):
    """The text is not YAML that settings can be read from; one line says why and where."""


def parse_yaml(text: str) -> Any:
    """The values in the text; None where it is empty. Nothing in it is run as code. Raises YamlError."""
    if len(text) > MOST_CHARACTERS:
        raise YamlError(f"it has {len(text):,} characters; settings have at most {MOST_CHARACTERS:,}")
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        if (values := _count(node, {})) > MOST_VALUES:
            raise YamlError(f"it stands for {values:,} values, aliases counted; settings have at most {MOST_VALUES:,}")
        return loader.construct_document(node)
    except YamlError:
        raise
    except RecursionError:
        raise YamlError(f"it is nested too deep; settings have at most {MOST_LEVELS} levels") from None
    except (yaml.YAMLError, ValueError, TypeError, OverflowError) as error:  # ValueError: such as the date 2024-13-45
        raise YamlError(" ".join(str(error).split())) from None


def _count(node: yaml.Node, known: dict[int, int | None], level: int = 1) -> int:
    """The values that a node stands for; `known`: those of the nodes so far, None while one is open."""
    if id(node) in known:
        if (found := known[id(node)]) is None:
            raise YamlError(f"the alias in line {node.start_mark.line + 1} stands for a value that contains it")
        return found
    if level > MOST_LEVELS:
        raise RecursionError

    known[id(node)] = None
    children: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        children = [one for pair in node.value for one in pair]
    elif isinstance(node, yaml.SequenceNode):
        children = node.value
    found = known[id(node)] = 1 + sum(_count(child, known, level + 1) for child in children)
    return found
