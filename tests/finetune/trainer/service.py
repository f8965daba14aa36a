"""A TrainingService in memory, over real gRPC: what it was asked, and a plane behind it."""

from concurrent import futures
from contextlib import contextmanager

import grpc
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from argosy.v1 import dataset_pb2, finetune_pb2
from argosy_internal.training.v1 import training_pb2, training_pb2_grpc
from services.finetune.trainer.control import Action, Fenced
from tests.finetune.trainer import world

TOKEN = "a-token"
ACTIONS = {
    Action.CONTINUE: training_pb2.RUN_ACTION_CONTINUE,
    Action.PAUSE: training_pb2.RUN_ACTION_PAUSE,
    Action.CANCEL: training_pb2.RUN_ACTION_CANCEL,
}


def spec(**others):
    own = {
        "base_model": "models/tiny",
        "train_version": "projects/p/datasets/d/versions/v",
        "method": finetune_pb2.TUNE_METHOD_CLASSIFY,
        "lora": finetune_pb2.Lora(rank=4, alpha=8, dropout=0.1),
        "hyperparameters": finetune_pb2.Hyperparameters(learning_rate=5e-3, epochs=2, batch_size=8, warmup_ratio=0.1),
        "seq_len": 96,
        "seed": 3,
        "early_stopping": finetune_pb2.EarlyStopping(patience=50),
        "checkpoint_interval_steps": 2,
        "validation_fraction": 0.2,
    }
    return finetune_pb2.FineTuneSpec(**own | others)


class Service(training_pb2_grpc.TrainingServiceServicer):
    def __init__(self, plane, spec):
        self.plane, self.spec = plane, spec
        self.requests = []
        self.refusal = None
        self.claims = {}

    def _enter(self, request, context):
        self.requests.append(request)
        if dict(context.invocation_metadata()).get("authorization") != f"Bearer {TOKEN}":
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "no token")
        if self.refusal is not None:
            context.abort(self.refusal, "refused")

    def _fenced(self, context):
        info = error_details_pb2.ErrorInfo(reason="WORKER_FENCED", domain="argosy.dev")
        status = status_pb2.Status(code=code_pb2.ABORTED, message="fenced")
        status.details.add().Pack(info)
        context.abort_with_status(rpc_status.to_status(status))

    def ClaimRun(self, request, context):
        self._enter(request, context)
        if request.nonce not in self.claims:
            self.claims[request.nonce] = self.plane.claim()
        claim = self.claims[request.nonce]
        grant = training_pb2.DataGrant(
            dataset_version=self.spec.train_version,
            object=claim.train.path,
            sha256=claim.train.sha256,
            total_bytes=claim.train.total_bytes,
            format=dataset_pb2.DATASET_FORMAT_CLASSIFY,
        )
        return training_pb2.ClaimRunResponse(
            fence=claim.fence,
            project_uid=claim.project_uid,
            spec=self.spec,
            spec_digest=claim.spec_digest,
            model=claim.model,
            train=grant,
            resume=[
                training_pb2.ResumePoint(step=point.step, prefix=point.prefix, manifest_digest=point.manifest_digest)
                for point in claim.resume
            ],
            prefix=claim.prefix,
        )

    def ReportProgress(self, request, context):
        self._enter(request, context)
        if request.fence != self.plane.fence:
            self._fenced(context)
        return training_pb2.ReportProgressResponse(action=ACTIONS[self.plane.action])

    def CommitCheckpoint(self, request, context):
        self._enter(request, context)
        prefix = f"jobs/{world.PROJECT}/{world.JOB}/f{request.fence}/step-{request.manifest.step}/"
        try:
            self.plane.commit(self.plane.objects.get(f"{prefix}manifest.json"))
        except Fenced:
            self._fenced(context)
        return training_pb2.CommitCheckpointResponse(action=ACTIONS[self.plane.action])

    def CompleteRun(self, request, context):
        self._enter(request, context)
        self.plane.ends.append(request)
        return training_pb2.CompleteRunResponse()


@contextmanager
def serving(service, port=0):
    server = grpc.server(futures.ThreadPoolExecutor(4), options=[("grpc.so_reuseport", 0)])
    training_pb2_grpc.add_TrainingServiceServicer_to_server(service, server)
    bound = server.add_insecure_port(f"127.0.0.1:{port}")
    server.start()
    try:
        yield bound
    finally:
        server.stop(0).wait()
