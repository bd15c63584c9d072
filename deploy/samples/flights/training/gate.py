"""Stage gate: lets a candidate pass that is good enough, calibrated, and not clearly worse than the version in Production."""

from collections.abc import Mapping

from common import MODEL, Stage, read_json
from millrace import Client, MillraceError

LEAST_AUC = {"base": 0.68, "all": 0.76}
# Each version was measured on its own held-out fortnight, and fortnights differ by about this much.
MARGIN = 0.03


def main() -> None:
    """Say in `result.json` whether the candidate passes; the coordinator ends the run when it does not."""
    stage = Stage.from_environment()
    evaluation = read_json(stage.inputs["evaluate"] / "evaluation.json")
    measured = evaluation["candidates"][evaluation["chosen"]]
    least = stage.number("min_auc", LEAST_AUC.get(stage.parameters.get("columns", "all"), LEAST_AUC["all"]))
    # A run that is made again is compared with its own first time, not with today's Production.
    production = {} if stage.reproduction_of else _production()
    problems = judge(measured, least, stage.number("max_ece", 0.15), production.get("auc"))
    reason = "; ".join(problems) or f"AUC {measured['auc']:.4f}, calibration error {measured['ece']:.4f}"
    print(f"{'refused' if problems else 'passed'}: {reason}", flush=True)
    stage.result(gate={"passed": not problems, "reason": reason}, auc=measured["auc"], ece=measured["ece"])


def judge(measured: Mapping[str, float], least_auc: float, most_ece: float, production_auc: float | None) -> list[str]:
    """Why the candidate must not pass; empty when it may."""
    problems = []
    if measured["auc"] < least_auc:
        problems.append(f"AUC {measured['auc']:.4f} is below {least_auc}")
    if measured["ece"] > most_ece:
        problems.append(f"calibration error {measured['ece']:.4f} is above {most_ece}")
    if production_auc is not None and measured["auc"] < production_auc - MARGIN:
        problems.append(f"AUC {measured['auc']:.4f} is more than {MARGIN} below Production's {production_auc:.4f}")
    return problems


def _production() -> Mapping[str, float]:
    """Metrics of the version in Production; empty when there is none yet."""
    with Client.from_environment() as client:
        try:
            return dict(client.registry.version(MODEL).metrics)
        except MillraceError as error:
            if error.code.name in {"NOT_FOUND", "FAILED_PRECONDITION"}:
                return {}
            raise


if __name__ == "__main__":
    main()
