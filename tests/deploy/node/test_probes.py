"""What the kubelet asks, and what else it could ask there: nothing."""

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from argosy.v1 import model_pb2, model_pb2_grpc
from tests.deploy.node.installed import Installed

COMPONENTS = ("gateway", "finetune", "model")
SERVING = health_pb2.HealthCheckResponse.SERVING


def addresses(installed: Installed, component: str) -> list[str]:
    """Health listeners of the component's pods."""
    pods = installed.get("pods", "-l", f"app.kubernetes.io/component={component}")["items"]
    return [f"{pod['status']['podIP']}:8081" for pod in pods]


@pytest.mark.parametrize("component", COMPONENTS)
def test_probes_answer_in_plaintext_and_nothing_else_does(installed: Installed, component: str) -> None:
    found = addresses(installed, component)
    assert found
    for address in found:
        with grpc.insecure_channel(address) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            for service in ("startup", "ready", "live"):
                assert health.Check(health_pb2.HealthCheckRequest(service=service), timeout=10).status == SERVING, service
            with pytest.raises(grpc.RpcError) as unknown:
                health.Check(health_pb2.HealthCheckRequest(service="no-such-probe"), timeout=10)
            assert unknown.value.code() is grpc.StatusCode.NOT_FOUND
            with pytest.raises(grpc.RpcError) as other:
                model_pb2_grpc.ModelServiceStub(channel).ListModels(model_pb2.ListModelsRequest(), timeout=10)
            assert other.value.code() is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize("component", COMPONENTS)
def test_pods_run_as_the_chart_says_and_have_not_restarted(installed: Installed, component: str) -> None:
    """The namespace enforces `restricted`, so that they run at all says the rest."""
    for pod in installed.get("pods", "-l", f"app.kubernetes.io/component={component}")["items"]:
        (container,) = pod["spec"]["containers"]
        assert container["securityContext"]["readOnlyRootFilesystem"] is True
        assert {probe: container[probe]["grpc"]["service"] for probe in ("startupProbe", "readinessProbe", "livenessProbe")} == {
            "startupProbe": "startup",
            "readinessProbe": "ready",
            "livenessProbe": "live",
        }
        assert [status["restartCount"] for status in pod["status"]["containerStatuses"]] == [0]
