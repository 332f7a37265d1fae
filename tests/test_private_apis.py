"""What other packages do not promise to keep still works as `mu2llm.private_apis` uses it."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import ray
import ray.data
from ray.core.generated.autoscaler_pb2 import ClusterConfig, NodeGroupConfig

from mu2llm import private_apis


def test_a_cluster_that_does_not_scale_itself_has_no_limits(ray_cluster):
    assert private_apis.cluster_limits() is None and private_apis.largest_resources() == {}
    assert not private_apis.scales_itself()


def test_what_a_cluster_can_grow_to_is_read_from_its_autoscaler(ray_cluster, monkeypatch):
    group = NodeGroupConfig(name="gpus", resources={"CPU": 8, "GPU": 2}, max_count=3)
    limits = ClusterConfig(node_group_configs=[group], max_resources={"CPU": 20})
    state = ray._private.state.state
    monkeypatch.setattr(
        state,
        "_connect_and_get_accessor",
        lambda: SimpleNamespace(get_internal_kv=lambda *_: limits.SerializeToString()),
    )
    assert private_apis.cluster_limits() == limits
    assert private_apis.largest_resources() == {"CPU": 20, "GPU": 6}


def test_the_scheduler_of_a_data_set_pauses_after_each_of_its_turns(ray_cluster, monkeypatch):
    pauses = []
    monkeypatch.setattr(private_apis, "time", SimpleNamespace(sleep=pauses.append))
    dataset = ray.data.range(4, override_num_blocks=2)
    private_apis.pause_scheduler(dataset)
    assert len(dataset.map(lambda row: row).take_all()) == 4
    assert private_apis.PAUSE_S in pauses


def test_moments_may_be_missing_where_it_is_said_and_not_otherwise():
    from accelerate.utils import fsdp_utils
    from torch.distributed.fsdp.fully_sharded_data_parallel import StateDictType

    plugin = SimpleNamespace(fsdp_version=2, state_dict_type=StateDictType.FULL_STATE_DICT, state_dict_config=None)
    assert fsdp_utils._prepare_sd_options(plugin).strict
    with private_apis.moments_may_be_missing():
        assert not fsdp_utils._prepare_sd_options(plugin).strict
        assert fsdp_utils._prepare_sd_options(SimpleNamespace(fsdp_version=1)) is None
    assert fsdp_utils._prepare_sd_options(plugin).strict


@pytest.mark.parametrize(("token", "mode"), [("t" * 64, "token"), (None, "None")])
def test_a_token_that_is_there_is_used(tmp_path, token, mode):
    code = (
        "import os; from mu2llm import private_apis; private_apis.use_token(); print(os.environ.get('RAY_AUTH_MODE'))"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    environment |= {"HOME": str(tmp_path), **({"RAY_AUTH_TOKEN": token} if token else {})}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == f"{mode}\n"


def test_the_version_of_a_cluster_comes_from_its_dashboard(ray_cluster):
    from ray.job_submission import JobSubmissionClient

    answered = SimpleNamespace(json=lambda: {"ray_version": ray.__version__})
    client = SimpleNamespace(_do_request=lambda method, path: answered)
    assert callable(JobSubmissionClient._do_request) and private_apis.ray_version(client) == ray.__version__


def test_sharding_over_processors_is_not_passed_over(monkeypatch):
    from accelerate import Accelerator, FullyShardedDataParallelPlugin, PartialState
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    monkeypatch.setattr(PartialState, "_shared_state", {})
    monkeypatch.setattr(AcceleratorState, "_shared_state", {})
    PartialState(cpu=True).distributed_type = DistributedType.MULTI_CPU
    private_apis.allow_fsdp_on_cpu()
    shards = Accelerator(cpu=True, fsdp_plugin=FullyShardedDataParallelPlugin(fsdp_version=2))
    assert shards.distributed_type == DistributedType.FSDP


def test_layers_are_named_by_the_model_that_has_them():
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, num_hidden_layers=1))
    assert private_apis.layer_classes(model) == {"LlamaDecoderLayer"}
