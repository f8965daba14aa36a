import threading

import grpc
import pytest

from argosy.v1 import finetune_pb2
from services.chassis.channel import PlaintextRefused
from services.finetune.trainer.attempt import DONE, Attempt
from services.finetune.trainer.control import Action, Failure, Fenced, Report, Unanswered
from services.finetune.trainer.spec import Hyperparameters, Lora, Method, Privacy
from services.finetune.trainer.wire import WireControl, spec_from_proto
from tests.finetune.trainer import world
from tests.finetune.trainer.service import TOKEN, Service, serving, spec


@pytest.fixture
def service():
    return Service(world.plane(), spec())


@pytest.fixture
def control(service):
    with serving(service) as port:
        client = WireControl(f"127.0.0.1:{port}", world.JOB, 1, TOKEN, patience_s=0.0)
        yield client
        client.close()


def test_a_run_over_the_wire_ends_in_a_manifest_of_everything_that_made_it(service, control, tiny_base):
    assert Attempt(control, service.plane.objects, tiny_base, threading.Event(), interval_s=0.05).run() == DONE
    (request,) = service.plane.ends
    manifest = request.result
    assert (request.job, request.fence) == (world.JOB, 1)
    assert (manifest.project_uid, manifest.model, manifest.base_model) == (world.PROJECT, "projects/p/models/m", "models/tiny")
    assert (manifest.rank, manifest.alpha, round(manifest.dropout, 6), list(manifest.labels)) == (4, 8.0, 0.1, ["sport", "tech"])
    assert {part.name for part in manifest.parts} == {"adapter.safetensors", "head.safetensors"}
    assert manifest.temperature > 0 and manifest.max_tokens == 96 and manifest.seed == 3
    assert [(used.use, used.rows) for used in manifest.datasets] == [("train", 32)]
    assert manifest.hyperparameters["learning_rate"] == "0.005" and manifest.metrics["validation_accuracy"] > 0
    assert not manifest.version and manifest.step == 8 and manifest.train_seconds > 0 and manifest.job == world.JOB
    reports = [request for request in service.requests if type(request).__name__ == "ReportProgressRequest"]
    assert [report.sequence for report in reports] == list(range(1, len(reports) + 1))
    assert {report.target_step for report in reports if report.HasField("target_step")} == {8}


def test_a_service_that_restarts_is_waited_for(service):
    with serving(service) as port:
        control = WireControl(f"127.0.0.1:{port}", world.JOB, 1, TOKEN)
        claim = control.claim()
    answered = threading.Event()

    def report():
        assert control.report(Report(step=1)) is Action.CONTINUE
        answered.set()

    thread = threading.Thread(target=report)
    thread.start()
    assert not answered.wait(0.5)
    with serving(service, port):
        assert answered.wait(20)
        assert control.claim() == claim  # the same nonce: the same fence
    thread.join()
    control.close()


def test_a_token_that_is_renewed_in_its_file_is_shown_from_then_on(service, tmp_path):
    file = tmp_path / "token"
    file.write_text("an old one")
    with serving(service) as port:
        control = WireControl(f"127.0.0.1:{port}", world.JOB, 1, file, patience_s=0.0)
        with pytest.raises(Fenced):
            control.claim()
        file.write_text(TOKEN + "\n")
        assert control.claim().fence == 1
        control.close()


def test_patience_ends(control, service):
    control.claim()
    service.refusal = grpc.StatusCode.UNAVAILABLE
    with pytest.raises(Unanswered):
        control.report(Report())


def test_T8_another_process_with_the_run_ends_this_one(control, service):
    control.claim()
    service.plane.fence += 1
    with pytest.raises(Fenced):
        control.report(Report())


@pytest.mark.parametrize("code", [grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.NOT_FOUND])
def test_a_token_that_died_with_its_attempt_ends_the_process(control, service, code):
    service.refusal = code
    with pytest.raises(Fenced):
        control.claim()


def test_another_refusal_is_no_reason_to_try_again(control, service):
    service.refusal = grpc.StatusCode.INVALID_ARGUMENT
    with pytest.raises(grpc.RpcError):
        control.claim()
    assert len(service.requests) == 1


def test_what_it_is_told_comes_back(control, service):
    control.claim()
    service.plane.action = Action.PAUSE
    assert control.report(Report()) is Action.PAUSE
    control.fail(Failure("DATA_INVALID", "V5.missing", 7, "label"))
    (request,) = service.plane.ends
    assert request.failure.reason == finetune_pb2.JOB_REASON_DATA_INVALID
    assert (request.failure.rule, request.failure.line, request.failure.field) == ("V5.missing", 7, "label")


def test_numbers_that_are_none_are_not_sent(control, service):
    control.claim()
    control.report(Report(metrics=(("loss", float("nan"), 1), ("loss", -1e30, 2)), evaluation={"validation_loss": float("inf")}))
    request = service.requests[-1]
    assert [metric.value for metric in request.metrics] == [1e9, -1e9] and request.evaluation["validation_loss"] == 1e9


def test_a_token_does_not_leave_the_machine_in_plaintext():
    with pytest.raises(PlaintextRefused):
        WireControl("finetune.example:443", world.JOB, 1, TOKEN)


def test_every_field_of_a_spec_is_read():
    read = spec_from_proto(
        spec(
            method=finetune_pb2.TUNE_METHOD_CHAT,
            lora=finetune_pb2.Lora(rank=8, alpha=4, dropout=0.25, targets=["q_proj"], rslora=True, dora=True),
            hyperparameters=finetune_pb2.Hyperparameters(
                learning_rate=0.5, epochs=1.5, batch_size=4, weight_decay=0.125, warmup_ratio=0.0, max_steps=9, max_grad_norm=2.0
            ),
            early_stopping=finetune_pb2.EarlyStopping(patience=2, min_delta=0.25, interval_steps=7),
            packing=False,
        )
    )
    assert read.method is Method.CHAT and not read.packing and read.evaluation_interval_steps == 7
    assert read.lora == Lora(8, 4.0, 0.25, ("q_proj",), rslora=True, dora=True)
    assert read.hyperparameters == Hyperparameters(0.5, None, 1.5, 4, 0.125, 0.0, 9, 2.0)
    assert (read.early_stopping.patience, read.early_stopping.min_delta, read.validation_fraction) == (2, 0.25, 0.2)


def test_privacy_turns_packing_off_and_narrows_the_adapter():
    read = spec_from_proto(spec(lora=None, packing=True, privacy=finetune_pb2.Privacy(epsilon=8, delta=1e-5)))
    assert read.privacy == Privacy(8.0, 1e-5) and not read.packing
    assert read.lora.rank == 8 and read.lora.targets == ("q_proj", "v_proj")
    assert spec_from_proto(spec(full=finetune_pb2.FullTune(), lora=None)).lora is None
