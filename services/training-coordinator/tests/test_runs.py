"""Runs of real processes through the real service."""

import json
from pathlib import Path

import psutil
import pytest
from millrace_api.training.v1 import training_pb2 as pb

from .conftest import Client, coordinator, manifest, stage, stages, until

FLAKY = """
import os, sys
print("attempt", os.environ["MILLRACE_ATTEMPT"])
sys.exit(1 if os.environ["MILLRACE_ATTEMPT"] == "1" else 0)
"""
MEET = """
import os, pathlib, sys, time
# Each branch waits for the other's sign: they end only if both run at once.
here = pathlib.Path({folder!r}); (here / os.environ["MILLRACE_STAGE"]).touch()
other = "b" if os.environ["MILLRACE_STAGE"] == "a" else "a"
end = time.time() + 20
while not (here / other).exists():
    if time.time() > end: sys.exit(78)
    time.sleep(0.01)
"""


async def test_stages_get_their_contract(client: Client, tmp_path: Path) -> None:
    files = {
        "make.py": """
            import json, os, pathlib
            out = pathlib.Path(os.environ["MILLRACE_OUTPUT_DIR"])
            (out / "data.txt").write_text("rows")
            (out / "result.json").write_text(json.dumps({"training_set_digest": "a" * 64, "definitions_hash": "d1",
                "table_versions": [{"table": "flights", "version": 7}]}))
        """,
        "use.py": """
            import json, os, pathlib
            inputs = json.loads(os.environ["MILLRACE_INPUTS"])
            assert pathlib.Path(inputs["make"], "data.txt").read_text() == "rows"
            assert os.environ["MILLRACE_INGESTION_ADDRESS"] == "127.0.0.1:7401"
            out = pathlib.Path(os.environ["MILLRACE_OUTPUT_DIR"])
            keep = {k: v for k, v in os.environ.items() if k.startswith("MILLRACE_") or k == "OMP_NUM_THREADS"}
            (out / "deep").mkdir(); (out / "deep" / "model.bin").write_bytes(b"model")
            (out / "result.json").write_text(json.dumps({"env": keep, "model": "m", "model_version": "1.0.0"}))
        """,
    }
    text = manifest(
        seed=7,
        parameters={"train_end": "2013-07-01", "rate": 0.1},
        stages=[
            {"name": "use", "command": ["python", "use.py"], "depends_on": ["middle"], "outputs": ["deep/model.bin"]},
            stage("middle", "pass", depends_on=["make"]),
            {"name": "make", "command": ["python", "make.py"], "resources": {"cpus": 2}},
        ],
    )
    run = await client.run(text, files, parameters={"rate": "0.25"}, cause="a test")
    assert run.state == pb.RUN_STATE_SUCCEEDED, stages(run)
    env = json.loads(stages(run)["use"].result_json)["env"]
    assert env["MILLRACE_RUN_ID"] == run.id
    assert (env["MILLRACE_STAGE"], env["MILLRACE_ATTEMPT"], env["MILLRACE_SEED"]) == ("use", "1", "7")
    assert json.loads(env["MILLRACE_PARAMETERS"]) == {"train_end": "2013-07-01", "rate": "0.25"}
    assert set(json.loads(env["MILLRACE_INPUTS"])) == {"make", "middle"}
    assert env["MILLRACE_CODE_HASH"] == run.record.code_hash
    assert env["MILLRACE_LOCK_HASH"] == run.record.lock_hash != ""
    assert env["OMP_NUM_THREADS"] == "1"
    assert run.record.training_set_digest == "a" * 64
    assert [(t.table, t.version) for t in run.record.table_versions] == [("flights", 7)]
    assert [o.path for o in run.record.outputs] == ["use/deep/model.bin"]
    assert (run.model, run.model_version, run.cause, run.seed) == ("m", "1.0.0", "a test", 7)
    assert run.record.hardware["cpu_count"]
    assert run.record.hardware["numpy"]
    content = tmp_path / "work/content/sha256" / run.record.outputs[0].sha256[:2] / run.record.outputs[0].sha256
    assert content.read_bytes() == b"model"


async def test_a_stage_that_fails_once_is_retried(client: Client) -> None:
    text = manifest(stages=[stage("flaky", FLAKY, retries=1), stage("after", "pass", depends_on=["flaky"])])
    await client.register(text)
    events = await client.watch((await client.start()).id)
    run = events[-1].run
    assert run.state == pb.RUN_STATE_SUCCEEDED
    assert (stages(run)["flaky"].attempts, stages(run)["flaky"].failure) == (2, "exit code 1")
    lines = [(e.log.attempt, e.log.text) for e in events if e.HasField("log")]
    assert lines == [(1, "attempt 1"), (2, "attempt 2")]
    seen = {stages(e.run)["flaky"].state for e in events if e.HasField("run")}
    assert pb.STAGE_STATE_SUCCEEDED in seen


@pytest.mark.parametrize(
    ("code", "retries", "attempts", "failure"),
    [
        ("raise SystemExit(3)", 1, 2, "exit code 3"),
        ("raise SystemExit(78)", 3, 1, "exit code 78 (permanent failure)"),
        ("raise SystemExit(75)", 1, 2, "exit code 75 (temporary failure)"),
        ("import os; os.kill(os.getpid(), 11)", 0, 1, "killed by SIGSEGV"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", 0, 1, "killed by SIGKILL"),
    ],
)
async def test_reasons_of_failure(client: Client, code: str, retries: int, attempts: int, failure: str) -> None:
    text = manifest(stages=[stage("bad", code, retries=retries), stage("after", "pass", depends_on=["bad"])])
    run = await client.run(text)
    assert run.state == pb.RUN_STATE_FAILED
    assert (stages(run)["bad"].attempts, stages(run)["bad"].failure) == (attempts, failure)
    assert stages(run)["after"].state == pb.STAGE_STATE_SKIPPED


@pytest.mark.parametrize(
    ("code", "failure"),
    [
        ("pass", "declared output 'model.bin' is missing"),
        ("import os; os.symlink('/etc/passwd', os.environ['MILLRACE_OUTPUT_DIR'] + '/model.bin')", "no regular file"),
        ("import os; open(os.environ['MILLRACE_OUTPUT_DIR'] + '/result.json', 'w').write('[1')", "is not JSON"),
        ("import os; open(os.environ['MILLRACE_OUTPUT_DIR'] + '/result.json', 'w').write(' ' * 70000)", "64 KiB"),
        (
            (
                "import os; open(os.environ['MILLRACE_OUTPUT_DIR'] + '/result.json', 'w').write("
                '\'{"gate": {"passed": false, "reason": "auc 0.6 < 0.8"}}\')'
            ),
            "the gate refused: auc 0.6 < 0.8",
        ),
    ],
)
async def test_what_a_stage_leaves_must_be_usable(client: Client, code: str, failure: str) -> None:
    run = await client.run(manifest(stages=[stage("bad", code, retries=3, outputs=["model.bin"])]))
    assert run.state == pb.RUN_STATE_FAILED
    assert stages(run)["bad"].attempts == 1
    assert failure in stages(run)["bad"].failure


async def test_a_missing_program_fails_for_good(client: Client) -> None:
    run = await client.run(manifest(stages=[{"name": "bad", "command": ["no-such-program"], "retries": 2}]))
    assert stages(run)["bad"].failure == "cannot start 'no-such-program': No such file or directory"
    assert stages(run)["bad"].attempts == 1


async def test_timeout_ends_the_whole_tree(client: Client, tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    # The grandchild leaves the process group and ignores SIGTERM, as badly as it can.
    code = f"""
    import os, signal, subprocess, sys, time
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    child = subprocess.Popen([sys.executable, "-c",
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(1000)"], start_new_session=True)
    open({str(pids)!r}, "w").write(f"{{os.getpid()}} {{child.pid}}")
    time.sleep(1000)
    """
    run = await client.run(manifest(stages=[stage("slow", code, timeout_s=1.5)]))
    assert run.state == pb.RUN_STATE_FAILED
    assert stages(run)["slow"].failure == "timeout: ran longer than 1.5 s"
    assert not any(psutil.pid_exists(int(pid)) for pid in pids.read_text().split())


async def test_memory_limit(client: Client) -> None:
    code = "import time; data = b'x' * (300 << 20); time.sleep(60)"
    run = await client.run(manifest(stages=[stage("greedy", code, resources={"memory_mib": 128})]))
    assert run.state == pb.RUN_STATE_FAILED
    assert stages(run)["greedy"].failure.startswith("out of memory: used 3")


async def test_leftover_processes_of_a_good_stage_are_ended(client: Client, tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    code = f"""
    import subprocess, sys
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"], start_new_session=True)
    open({str(pid)!r}, "w").write(str(child.pid))
    """
    run = await client.run(manifest(stages=[stage("litter", code)]))
    assert run.state == pb.RUN_STATE_SUCCEEDED
    assert not psutil.pid_exists(int(pid.read_text()))


async def test_parallel_branches_overlap(client: Client, tmp_path: Path) -> None:
    code = MEET.format(folder=str(tmp_path))
    run = await client.run(manifest(stages=[stage("a", code), stage("b", code)]))
    assert run.state == pb.RUN_STATE_SUCCEEDED


async def test_the_cpu_budget_holds_branches_back(settings, tmp_path: Path) -> None:
    code = f"""
    import os, sys, time
    try: os.mkdir({str(tmp_path / "only-one")!r})
    except FileExistsError: sys.exit(78)
    time.sleep(0.3)
    os.rmdir({str(tmp_path / "only-one")!r})
    """
    names = [stage(f"s{n}", code, resources={"cpus": 1.5}) for n in range(3)]
    async with coordinator(settings.model_copy(update={"cpus": 2.0})) as client:
        run = await client.run(manifest(stages=names))
    assert run.state == pb.RUN_STATE_SUCCEEDED, stages(run)


async def test_cancel_ends_everything(client: Client, tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    code = f"""
    import os, subprocess, sys, time
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"], start_new_session=True)
    open({str(pids)!r}, "w").write(f"{{os.getpid()}} {{child.pid}}")
    print("ready", flush=True)
    time.sleep(1000)
    """
    await client.register(
        manifest(stages=[stage("slow", code, retries=3), stage("after", "pass", depends_on=["slow"])])
    )
    run_id = (await client.start()).id
    await until(lambda: pids.exists() and pids.read_text().count(" ") == 1, "the stage's processes")
    await client.cancel(run_id)
    run = await client.ended(run_id)
    assert run.state == pb.RUN_STATE_CANCELLED
    assert (stages(run)["slow"].state, stages(run)["slow"].failure) == (pb.STAGE_STATE_FAILED, "cancelled")
    assert stages(run)["after"].state == pb.STAGE_STATE_SKIPPED
    assert not any(psutil.pid_exists(int(pid)) for pid in pids.read_text().split())
    assert (await client.cancel(run_id)).state == pb.RUN_STATE_CANCELLED


async def test_start_is_idempotent(client: Client) -> None:
    await client.register(manifest(parameters={"a": "1"}, stages=[stage("s", "pass")]))
    first = await client.start(request_id="once")
    await client.register(manifest(parameters={"a": "2"}, stages=[stage("s", "pass")]))
    assert (await client.start(request_id="once")).id == first.id
    await client.ended(first.id)
    assert (await client.start(request_id="once")).id == first.id
    assert (await client.start()).id != first.id


async def test_runs_are_listed_newest_first(client: Client) -> None:
    await client.register(manifest("one", stages=[stage("s", "pass")]))
    await client.register(manifest("two", stages=[stage("s", "pass")]))
    ids = [(await client.start(name)).id for name in ("one", "two", "one")]
    answer = await client.stub.ListRuns(pb.ListRunsRequest())
    assert [run.id for run in answer.runs] == ids[::-1]
    answer = await client.stub.ListRuns(pb.ListRunsRequest(pipeline="one", page_size=1))
    assert [run.id for run in answer.runs] == [ids[2]]


async def test_changed_code_is_restored(client: Client) -> None:
    spoil = "import os; os.chmod('main.py', 0o644); open('main.py', 'a').write('raise SystemExit(78)')"
    text = manifest(
        stages=[stage("spoil", spoil), {"name": "run", "command": ["python", "main.py"], "depends_on": ["spoil"]}]
    )
    run = await client.run(text, {"main.py": "print('clean')\n"})
    assert run.state == pb.RUN_STATE_SUCCEEDED, stages(run)


async def test_logs_are_bounded(settings) -> None:
    code = "import sys; [sys.stdout.write('x' * 1023 + chr(10)) for _ in range(3 * 1024)]"
    async with coordinator(settings.model_copy(update={"log_limit_mib": 1})) as client:
        await client.register(manifest(stages=[stage("loud", code)]))
        events = await client.watch((await client.start()).id)
    assert events[-1].run.state == pb.RUN_STATE_SUCCEEDED
    lines = [e.log.text for e in events if e.HasField("log")]
    assert lines[-1] == "[log limit of 1 MiB reached, the rest is dropped]"
    assert sum(len(line) + 1 for line in lines) < (1 << 20) + 200


async def test_watching_again_gives_everything_again(client: Client) -> None:
    run = await client.run(
        manifest(stages=[stage("s", "print('one'); print('x' * 20000); print('no newline', end='')")])
    )
    events = await client.watch(run.id)
    lines = [e.log.text for e in events if e.HasField("log")]
    assert lines[0] == "one"
    assert "".join(lines[1:-1]) == "x" * 20000
    assert lines[-1] == "no newline"
    assert events[-1].run == run


async def test_old_runs_lose_their_files_but_not_their_record(settings, tmp_path: Path) -> None:
    async with coordinator(settings.model_copy(update={"keep_finished_runs": 1})) as client:
        first = await client.run(manifest(stages=[stage("s", "print('hello')")]))
        second = await client.run(manifest(stages=[stage("s", "print('hello')")]))
        folder = tmp_path / "work" / "runs"
        await until(lambda: [p.name for p in folder.iterdir()] == [second.id], "the first run's files to go")
        assert (await client.watch(first.id))[-1].run == first


@pytest.mark.slow
async def test_torchrun_stage_with_two_workers(client: Client) -> None:
    files = {
        "train.py": """
            import json, os, pathlib
            import torch, torch.distributed as dist
            dist.init_process_group("gloo")
            value = torch.tensor([float(dist.get_rank() + 1)])
            dist.all_reduce(value)
            print("rank", dist.get_rank(), "of", dist.get_world_size(), "sum", value.item(), flush=True)
            if dist.get_rank() == 0:
                out = pathlib.Path(os.environ["MILLRACE_OUTPUT_DIR"], "result.json")
                out.write_text(json.dumps({"sum": value.item(), "threads": torch.get_num_threads()}))
            dist.destroy_process_group()
        """
    }
    train = {
        "name": "train",
        "command": ["python", "train.py"],
        "distributed": {"workers": 2},
        "resources": {"cpus": 2, "memory_mib": 4096},
    }
    await client.register(manifest(stages=[train]), files)
    events = await client.watch((await client.start()).id)
    lines = [e.log.text for e in events if e.HasField("log")]
    assert events[-1].run.state == pb.RUN_STATE_SUCCEEDED, lines
    assert json.loads(stages(events[-1].run)["train"].result_json) == {"sum": 3.0, "threads": 1}
    told = {line for line in lines if "rank" in line and "sum" in line}
    assert told == {f"[default{n}]:rank {n} of 2 sum 3.0" for n in range(2)}


async def test_exit_codes_survive_torchrun(client: Client) -> None:
    code = "import os, sys, time\nif os.environ['RANK'] == '1': sys.exit(78)\ntime.sleep(100)\n"
    one = {"name": "bad", "command": ["python", "bad.py"], "retries": 3, "distributed": {"workers": 2}}
    run = await client.run(manifest(stages=[one]), {"bad.py": code})
    assert (stages(run)["bad"].attempts, stages(run)["bad"].failure) == (1, "exit code 78 (permanent failure)")


async def test_an_attempt_finds_what_the_one_before_left(client: Client) -> None:
    code = """
    import os, pathlib, sys
    file = pathlib.Path(os.environ["MILLRACE_CHECKPOINT_DIR"], "state")
    print("found", file.exists())
    file.touch()
    sys.exit(75 if os.environ["MILLRACE_ATTEMPT"] == "1" else 0)
    """
    await client.register(manifest(stages=[stage("learn", code, retries=1)]))
    events = await client.watch((await client.start()).id)
    assert [e.log.text for e in events if e.HasField("log")] == ["found False", "found True"]
