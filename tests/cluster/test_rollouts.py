"""Rollouts driven by kubectl, under steady load: no client request fails in any of them."""

import time
from collections.abc import Iterator

import pytest
from millrace import Client

from tests.cluster import figures, models
from tests.cluster.load import Load, within_binomial
from tests.cluster.release import Release, eventually

SAMPLE = 600
SLOW_BOUND_MS = 400


@pytest.fixture(scope="module")
def client(release: Release) -> Iterator[Client]:
    with release.client() as made:
        yield made


def _serve(release: Release, client: Client, name: str, *versions: str, slow: tuple[str, ...] = ()) -> None:
    models.create(client, name, versions, slow=slow)
    release.apply(models.manifest(name, versions[0]))
    release.wait_stable(name, versions[0])


def test_a_first_version_answers_soon_after_apply(release: Release, client: Client) -> None:
    name = release.fresh("first")
    models.create(client, name, ("1.0.0",))
    applied = time.monotonic()
    release.apply(models.manifest(name, "1.0.0"))
    # Until there is a route the gateway answers NOT_FOUND; those calls are not errors of a rollout.
    with Load(release.address("gateway"), name, models.WIDTH, rate=5) as load:
        eventually("an answer", lambda: load.answers or None, 240, lambda: release.describe(name))
        figures.keep("seconds from kubectl apply to the first answer", round(load.answers[0][0] - applied, 2))
    assert {error.partition(":")[0] for _, error in load.errors} <= {"NOT_FOUND", "UNAVAILABLE"}


def test_canary_goes_to_all_traffic_and_its_weights_are_what_clients_see(release: Release, client: Client) -> None:
    name = release.fresh("steps")
    _serve(release, client, name, "1.0.0", "1.1.0")
    with Load(release.address("gateway"), name, models.WIDTH) as load:
        load.wait_for(20)
        steps = [{"weight": 10, "pause": {}}, {"weight": 50, "pause": {}}, {"weight": 100}]
        applied = time.monotonic()
        release.apply(models.manifest(name, "1.1.0", steps=steps))
        for weight in (10, 50):
            _hold(release, name, weight)
            figures.keep(f"seconds from the step before to {weight} % in force", round(time.monotonic() - applied, 2))
            seen = load.wait_for(SAMPLE)
            assert set(seen) <= {"1.0.0", "1.1.0"}
            assert within_binomial(seen["1.1.0"], SAMPLE, weight / 100), f"{weight} %: {seen}"
            done = release.plugin("resume", name)
            assert done.returncode == 0, done.stderr
            applied = time.monotonic()
        release.wait_stable(name, "1.1.0")
        figures.keep("seconds from 50 % to promoted, old version drained", round(time.monotonic() - applied, 2))
        after = time.monotonic()
        load.wait_for(100)
        assert set(load.count(after)) == {"1.1.0"}
    assert load.errors == []


def _hold(release: Release, name: str, weight: float) -> None:
    """Wait until the step with this weight waits for a person."""

    def holds() -> bool | None:
        status = release.deployment(name)["status"]
        return (status.get("weight") == weight and status.get("phase") == "Paused") or None

    eventually(f"{name} waits at {weight:g} %", holds, 240, lambda: release.describe(name))


def test_slow_version_is_rolled_back_by_its_gate(release: Release, client: Client) -> None:
    name = release.fresh("slow")
    _serve(release, client, name, "1.0.0", "1.1.0", slow=("1.1.0",))
    with Load(release.address("gateway"), name, models.WIDTH, rate=20) as load:
        load.wait_for(20)
        began = time.monotonic()
        gates = [{"metric": "latencyP99Ms", "max": SLOW_BOUND_MS}]
        release.apply(models.manifest(name, "1.1.0", steps=[{"weight": 20, "minRequests": 2000}], gates=gates))

        def rolled_back() -> dict[str, object] | None:
            status = release.deployment(name)["status"]
            found: dict[str, object] = status
            return found if status.get("phase") == "RolledBack" else None

        status = eventually("rollback", rolled_back, 240, lambda: release.describe(name))
        requests = load.count(began)
        figures.keep("requests until a slow version was rolled back", dict(requests))
        assert requests["1.1.0"] <= 200, requests
        assert "latencyP99Ms" in str(status["conditions"])
        after = time.monotonic()
        load.wait_for(60)
        assert set(load.count(after)) == {"1.0.0"}
    assert load.errors == []


def test_verbs_of_the_plugin(release: Release, client: Client) -> None:
    name = release.fresh("verbs")
    _serve(release, client, name, "1.0.0", "1.1.0", "1.2.0")
    held = [{"weight": 20, "pause": {}}, {"weight": 100}]

    def do(*words: str) -> None:
        done = release.plugin(words[0], name, *words[1:])
        assert done.returncode == 0, f"{words}: {done.stderr}{done.stdout}"

    with Load(release.address("gateway"), name, models.WIDTH) as load:
        release.apply(models.manifest(name, "1.1.0", steps=held))
        _hold(release, name, 20)
        do("set-weight", "35")
        eventually("35 %", lambda: _at(release, name, 35), 60, lambda: release.describe(name))
        seen = load.wait_for(SAMPLE)
        assert within_binomial(seen["1.1.0"], SAMPLE, 0.35), seen
        do("abort")
        eventually("back", lambda: _phase(release, name, "RolledBack"), 120, lambda: release.describe(name))
        assert set(load.wait_for(60)) == {"1.0.0"}
        release.apply(models.manifest(name, "1.2.0", steps=held))
        _hold(release, name, 20)
        do("promote")
        release.wait_stable(name, "1.2.0")
        assert set(load.wait_for(60)) == {"1.2.0"}
        do("undo")
        release.wait_stable(name, "1.0.0")
        assert set(load.wait_for(60)) == {"1.0.0"}
        assert release.deployment(name)["spec"]["version"] == "1.0.0"
    assert load.errors == []
    shown = release.plugin("get", name)
    assert shown.returncode == 0
    assert "1.0.0" in shown.stdout


def _at(release: Release, name: str, weight: float) -> bool | None:
    return release.deployment(name)["status"].get("weight") == weight or None


def _phase(release: Release, name: str, phase: str) -> bool | None:
    return release.deployment(name)["status"].get("phase") == phase or None


def test_bad_manifest_is_refused_with_the_field_named(release: Release) -> None:
    import yaml

    bad = models.manifest("bad", "1.0.0", steps=[{"weight": 50}, {"weight": 20}])
    done = release.call("kubectl", "-n", release.namespace, "apply", "-f", "-", stdin=yaml.safe_dump(bad))
    assert done.returncode != 0
    assert "spec.rollout.steps" in done.stderr
    bad = models.manifest("bad", "1.0.0", stepps=[{"weight": 50}])
    done = release.call("kubectl", "-n", release.namespace, "apply", "-f", "-", stdin=yaml.safe_dump(bad))
    assert done.returncode != 0
    assert "stepps" in done.stderr


def test_blue_green_switches_at_once_and_back(release: Release, client: Client) -> None:
    name = release.fresh("bluegreen")
    _serve(release, client, name, "1.0.0", "1.1.0")
    with Load(release.address("gateway"), name, models.WIDTH) as load:
        began = time.monotonic()
        change = models.manifest(name, "1.1.0")
        change["spec"]["rollout"] = {"strategy": "BlueGreen"}  # type: ignore[index]
        release.apply(change)
        release.wait_stable(name, "1.1.0")
        assert set(load.wait_for(60)) == {"1.1.0"}
        # One switch: after the first answer of the new version, the old one answers only what was under way.
        times = {v: [at for at, version in load.answers if version == v and at >= began] for v in ("1.0.0", "1.1.0")}
        assert max(times["1.0.0"]) - min(times["1.1.0"]) < 2.0
        done = release.plugin("undo", name)
        assert done.returncode == 0, done.stderr
        release.wait_stable(name, "1.0.0", timeout_s=30)
        assert set(load.wait_for(60)) == {"1.0.0"}
    assert load.errors == []
