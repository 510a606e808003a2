"""Words of which files and command lines are made that nobody would write."""

from hypothesis import strategies as st

from ccmim_fast.config.keys import settings

WORDS = """
0 1 -1 2 16 0.5 1.5 1e3 1e999 1e-400 -0.0 .nan -.inf nan 0x1f 0b1 1_0 +1 007 1:30 2024-13-45 ½ ٣ １ true yes off null ~
auto never random block importance cpu fp16 hog resnet50 flexivit_small vit_base_patch16_224 vit_huge_patch14_224
mask.ratio a.b.c.d ../../x ${HOME} $(id) ' " % @ ` | > # - -- --- = --= -h --help [] [1] [a] {} *a
!!python/name:os.system"""
SCRAPS = [
    *WORDS.split(),
    *("", " 1", "1 ", "[1, 2]", "[0.5, 0.5, 0.5]", "[[1], 2]", "[224, 224]", "{a: 1}", "{ratio: 2}", "&a [*a]", "- a"),
    *("!!int ''", "!!bool x", "!!binary x", "? b", "a: b", "a\nb", "a\tb", "\0", "\x85", "\x1b[31m", "\u2028"),
    *("\ud800", "\udcff", '"\\ud800"', "\U0001f600", "9" * 30, "9" * 5000, "0x" + "f" * 5000, "x" * 3000),
    *("[" * 3000, "{" * 3000),
]
KEYS = [
    *settings(),
    *("mask", "run", "data", "train", "ratio", "mask.rato", "config", "resume", "overwrite", "allow-change"),
    "print_config",
]


@st.composite
def changed(draw, originals):
    """A text with some of its characters gone, and something else in their place."""
    text = draw(originals)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(text)))
        end = start + draw(st.sampled_from([0, 1, 1, 5, 40]))
        text = text[:start] + draw(st.sampled_from([*SCRAPS, "\n", " ", ":", ""])) + text[end:]
    return text
