"""`ccmim export`: a run's weights in the form that another library loads."""

import argparse
from pathlib import Path

from ccmim_fast.config.keys import nearest
from ccmim_fast.config.parser import Parser
from ccmim_fast.errors import ConfigError, say
from ccmim_fast.export.targets import TARGETS, export_run

_HELP = """
Write the newest checkpoint of a run as another library loads it. A folder has a model card
beside the weights. Averaged weights are taken where the run has them.
"""


def export(argv: list[str]) -> None:
    """Write one of `TARGETS`, print the paths, and upload the folder if asked to."""
    given = _read(argv)
    for path in export_run(given.target, given.run, given.out, given.result, given.push):
        say(str(path))
    if not given.push:
        return
    from ccmim_fast.export.hub import push, to_upload

    if not given.dry_run:
        say(push(given.out, given.push, given.private))
        return
    say(f"would go to {given.push}, {'private' if given.private else 'for everyone'}:")
    for name, size in to_upload(given.out):
        say(f"{size:>14,} bytes  {name}")


def _read(argv: list[str]) -> argparse.Namespace:
    targets = "".join(
        f"\n  {name:13}{target.help}{f'; or FILE{target.suffix}' if target.suffix else ''}"
        for name, target in TARGETS.items()
    )
    formatter = argparse.RawDescriptionHelpFormatter
    parser = Parser("ccmim export", _HELP, epilog=f"targets:{targets}", formatter_class=formatter)
    parser.add_argument("target", metavar="TARGET", help="one of the list below")
    parser.add_argument("run", metavar="RUN", help="a run's folder, or one of its checkpoints")
    parser.add_argument("out", metavar="OUT", type=Path, help="a new folder, or a file where the target is one")
    parser.add_argument(
        "--result", metavar="FILE", action="append", default=[], help="result.json of an evaluation, for the card"
    )
    parser.add_argument("--push", metavar="OWNER/NAME", default="", help="upload the folder to the Hugging Face hub")
    parser.add_argument("--private", action="store_true", help="as a private model, if it is new")
    parser.add_argument("--dry-run", action="store_true", help="write all, say what would be uploaded, upload nothing")
    given = parser.parse_args(argv)
    if given.target not in TARGETS:
        raise ConfigError(
            f"ccmim export: {given.target!r:.80}: no such target; one of {', '.join(TARGETS)}; "
            f"nearest: {nearest(given.target, TARGETS)}"
        )
    suffix, others = TARGETS[given.target].suffix, {target.suffix for target in TARGETS.values()} - {""}
    if given.out.suffix in others - {suffix}:
        forms = f"FILE{suffix} or a folder" if suffix else "a folder"
        raise ConfigError(f"ccmim export {given.target}: OUT={str(given.out)!r:.200} must be {forms}")
    if given.push:
        from ccmim_fast.export.hub import check_name

        check_name(given.push)
        if suffix and given.out.suffix == suffix:
            raise ConfigError(f"ccmim export: --push needs a folder with its card, got {str(given.out)!r:.200}")
    elif given.dry_run or given.private:
        raise ConfigError("ccmim export: --dry-run and --private are for --push OWNER/NAME")
    return given
