"""Turns the whole loop on the flights of 2013, step by step, against a running Millrace (`millrace demo` starts one)."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from loop import learning, serving
from loop.common import SERVING_START, YEAR_END, Loop
from loop.replay import MODEL, Replay
from loop.story import Story
from millrace import Client, MillraceError

STEPS = (
    ("ingest January to June: flights, weather, outcomes", learning.ingest),
    ("define features, fill the online store, build a training set", learning.define_features),
    ("train 1.0.0 on schedule and weather", learning.train_first),
    ("take 1.0.0 through the registry's stages", learning.register_first),
    ("serve 1.0.0 on two Triton replicas", serving.deploy_first),
    ("replay July through the gateway", serving.replay_july),
    ("roll out 1.1.0 (better), 1.2.0 (broken), 1.3.0 (slow)", serving.canaries),
    ("find drift and retrain", serving.drift),
    ("walk back from one prediction", serving.walk_back),
)


def main() -> int:
    """Run every step; returns the exit status."""
    story = Story()
    with Client.from_environment() as client:
        loop = Loop(client, story, Replay(client, SERVING_START, YEAR_END))
        ok = True
        for number, (title, run) in enumerate(STEPS, start=1):
            try:
                with story.step(number, title):
                    run(loop)
            except KeyboardInterrupt:
                story.console.print("   interrupted")
                return 130
            except MillraceError as error:
                story.console.print(f"   [bold red]{error.code.name} {error.reason}[/]: {error.message}")
                ok = False
                break
            except Exception as error:
                story.console.print(f"   [bold red]{type(error).__name__}[/]: {error}")
                if not type(error).__module__.startswith("loop"):
                    story.console.print_exception()
                ok = False
                break
        _places(loop)
        story.summary()
    story.console.print("[bold green]the loop turned[/]" if ok else "[bold red]the loop stopped[/]")
    return 0 if ok else 1


def _places(loop: Loop) -> None:
    at, story = loop.client.endpoints, loop.story
    try:
        figures = loop.client.gateway.figures(MODEL)
        story.keep("prediction log", "logged / dropped", f"{figures.logged:,} / {figures.dropped:,}")
        for deployment in loop.client.rollout.list():
            arms = ", ".join(f"{arm.version} {arm.weight:g} %" for arm in deployment.arms)
            story.keep("rollouts", "weights now", arms)
    except MillraceError as error:
        story.keep("prediction log", "not known", error.message)
    story.keep("clients", "failed client requests", str(loop.failed_requests))
    host, _, port = at.gateway.rpartition(":")
    story.keep("places", "console", f"http://{host}:{int(port) + 80}/")
    story.keep("places", "gateway (V2 gRPC, Predict)", at.gateway)
    for name in ("ingestion", "feature", "registry", "training", "drift", "rollout"):
        story.keep("places", name, getattr(at, name))


if __name__ == "__main__":
    sys.exit(main())
