"""The flights loop against the cluster through its Services: the same program a person runs."""

from tests.cluster.release import PORTS, ROOT, Release, python

DEMO_TIMEOUT_S = 1200.0


def test_the_loop_turns(release: Release) -> None:
    tls = release.certificates()
    environment = {
        **release.environment,
        **{f"MILLRACE_{area.upper()}_ADDRESS": release.address(area) for area in PORTS},
        "MILLRACE_TLS_CERT": tls.cert_file,
        "MILLRACE_TLS_KEY": tls.key_file,
        "MILLRACE_TLS_CA": tls.ca_file,
    }
    script = str(ROOT / "deploy" / "samples" / "flights" / "demo.py")
    done = python(script, environment=environment, timeout_s=DEMO_TIMEOUT_S)
    print(done.stdout[-6000:])
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    assert "the loop turned" in done.stdout
