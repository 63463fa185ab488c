"""What a user takes to AWS and to Grafana is valid, without AWS."""

from __future__ import annotations

import fnmatch
import json
import os
import re
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from typing import Any

import botocore.session
import pytest
import yaml
from aiobotocore.client import AioBaseClient
from botocore.exceptions import ClientError
from botocore.validate import ParamValidator

from jobs import node, sweep, train
from smc.errors import AccessDenied, Conflict
from smc.storage import AsyncBlockchainModelStore
from smc.storage.gc import RetentionPolicy, collect
from smc.storage.limits import LIMITS
from smc.storage.spool import CommitRecord

ROOT = Path(__file__).parent.parent
IN_BUCKET = ROOT / "docs" / "iam" / "bucket"
POLICIES = sorted((ROOT / "docs" / "iam").glob("*.json"))
BUCKET = "arn:aws:s3:::BUCKET"


@pytest.fixture(scope="module")
def cluster() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "ray_cluster.yaml").read_text())
    return loaded


def test_the_cluster_file_is_one_for_rays_autoscaler(cluster: dict[str, Any]) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(json.loads(json.dumps(cluster))))
    with pytest.raises(Exception, match="available_node_type"):
        validate_config(prepare_config({**cluster, "available_node_type": {}}))


def test_its_nodes_are_what_ec2_starts(cluster: dict[str, Any]) -> None:
    model = botocore.session.get_session().get_service_model("ec2").operation_model("RunInstances")
    for name, kind in cluster["available_node_types"].items():
        report = ParamValidator().validate({"MinCount": 1, "MaxCount": 1, **kind["node_config"]}, model.input_shape)
        assert not report.has_errors(), (name, report.generate_report())
        assert kind["node_config"]["MetadataOptions"]["HttpTokens"] == "required"  # IMDSv2
        assert all(device["Ebs"]["Encrypted"] for device in kind["node_config"]["BlockDeviceMappings"])
    head, worker = (cluster["available_node_types"][name] for name in ("head", "gpu_worker"))
    # Images that have the Python of the setup commands, and that the head may look up.
    policy = json.loads((ROOT / "docs" / "iam" / "autoscaler.json").read_text())
    for kind in (head, worker):
        image = kind["node_config"]["ImageId"]
        assert re.search(r"ubuntu(/server/|-)24\.04", image)
        parameter = "arn:aws:ssm:eu-central-1::parameter" + image.removeprefix("resolve:ssm:")
        assert allowed(policy, "ssm:GetParameters", parameter)
    assert head["resources"] == {"CPU": 0, "ledger": 1}
    assert worker["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert worker["min_workers"] == 0
    assert head["node_config"]["IamInstanceProfile"] != worker["node_config"]["IamInstanceProfile"]


def test_its_commands_hold_no_secret_and_ask_for_a_token(cluster: dict[str, Any]) -> None:
    starts = [*cluster["head_start_ray_commands"], *cluster["worker_start_ray_commands"]]
    assert sum("RAY_AUTH_MODE=token" in command for command in starts) == 2
    text = (ROOT / "ray_cluster.yaml").read_text()
    assert not re.search(r"AWS_SECRET|AKIA[0-9A-Z]{16}|RAY_AUTH_TOKEN=", text)
    (worker,) = (command for command in starts if "jobs.node" in command)
    arguments = worker.split("jobs.node ")[1].split(" > ")[0].split()
    assert arguments[:3] == ["--spot", "--", "ray"]
    assert "--block" in arguments
    assert node.spot_notice("http://127.0.0.1:9") is False


def _listed(value: Any) -> list[str]:
    return value if isinstance(value, list) else [value]


def allowed(policy: dict[str, Any], action: str, resource: str, **context: str) -> bool:
    """Whether a policy allows an action: an explicit denial wins, a condition on a key that is not given fails."""
    given = {"SecureTransport": "true", **context}

    def holds(operator: str, key: str, wanted: Any) -> bool:
        name = key.partition(":")[2].replace("-", "_")
        if operator == "Null":
            return (name not in given) == (wanted == "true")
        test = {"Bool": str.__eq__, "StringEquals": str.__eq__, "StringLike": fnmatch.fnmatchcase}[operator]
        return name in given and any(test(given[name], value) for value in _listed(wanted))

    def matches(statement: dict[str, Any]) -> bool:
        conditions = statement.get("Condition", {}).items()
        return (
            any(fnmatch.fnmatchcase(action, a) for a in _listed(statement["Action"]))
            and any(fnmatch.fnmatchcase(resource, r) for r in _listed(statement["Resource"]))
            and all(holds(operator, *each) for operator, keys in conditions for each in keys.items())
        )

    effects = [statement["Effect"] for statement in policy["Statement"] if matches(statement)]
    return "Deny" not in effects and "Allow" in effects


def denied(policy: dict[str, Any], action: str, resource: str, **context: str) -> bool:
    """Whether a bucket's policy, which allows nothing by itself, denies an action."""
    anybody = {"Effect": "Allow", "Action": "*", "Resource": "*"}
    return not allowed({"Statement": [*policy["Statement"], anybody]}, action, resource, **context)


CASES = [
    # action, object, with If-None-Match; who may
    ("s3:GetObject", "log/0000000000.jsonl", False, {"reader", "trainer", "ledger", "collector"}),
    ("s3:GetObject", "blobs/00.safetensors", False, {"reader", "trainer", "ledger", "collector"}),
    ("s3:PutObject", "log/0000000000.jsonl", True, {"ledger", "collector"}),
    ("s3:PutObject", "log/0000000000.jsonl", False, set()),
    ("s3:PutObject", "blobs/00.safetensors", True, {"trainer", "ledger"}),
    ("s3:PutObject", "blobs/00.safetensors", False, set()),
    ("s3:PutObject", "waiting.json", False, {"ledger", "collector"}),
    ("s3:GetObject", "waiting.json", False, {"ledger", "collector"}),
    ("s3:DeleteObject", "waiting.json", False, set()),
    ("s3:PutObject", "head.json", False, {"ledger", "collector"}),
    ("s3:PutObject", "index/0000000000.json", False, {"ledger", "collector"}),
    ("s3:DeleteObject", "blobs/00.safetensors", False, {"collector"}),
    ("s3:DeleteObject", "log/0000000000.jsonl", False, set()),
    ("s3:DeleteObject", "head.json", False, set()),
    ("s3:DeleteObjectVersion", "log/0000000000.jsonl", False, set()),
    ("s3:PutBucketPolicy", "log/0000000000.jsonl", False, set()),
]


@pytest.mark.parametrize(("action", "key", "if_none_match", "who"), CASES)
def test_each_role_may_do_what_it_needs_and_no_more(action: str, key: str, if_none_match: bool, who: set[str]) -> None:
    found, context = set(), {"if_none_match": "*"} if if_none_match else {}
    context["ObjectCreationOperation"] = "true"
    for path in POLICIES:
        policy = json.loads(path.read_text())
        if allowed(policy, action, f"{BUCKET}/PREFIX/{key}", **context):
            found.add(path.stem)
        assert not allowed(policy, action, f"{BUCKET}/PREFIX/{key}", SecureTransport="false", **context)
        assert not allowed(policy, action, f"arn:aws:s3:::another/{key}", **context)
    assert found == who


HISTORY = [
    # action, object, with If-None-Match; whether the bucket's policy denies it to everybody, whatever their role says
    ("s3:PutObject", "log/0000000000.jsonl", True, False),
    ("s3:PutObject", "log/0000000000.jsonl", False, True),
    ("s3:PutObject", "blobs/00.safetensors", True, False),
    ("s3:PutObject", "blobs/00.safetensors", False, True),
    ("s3:PutObject", "head.json", False, False),
    ("s3:DeleteObject", "log/0000000000.jsonl", False, True),
    ("s3:DeleteObject", "blobs/00.safetensors", False, False),
    ("s3:DeleteObjectVersion", "blobs/00.safetensors", False, True),
    ("s3:DeleteObjectVersion", "head.json", False, True),
    ("s3:BypassGovernanceRetention", "log/0000000000.jsonl", False, True),
]


@pytest.mark.parametrize(("action", "key", "if_none_match", "is_denied"), HISTORY)
def test_a_bucket_keeps_its_history_from_everybody(action: str, key: str, if_none_match: bool, is_denied: bool) -> None:
    context = {"if_none_match": "*"} if if_none_match else {}
    context["ObjectCreationOperation"] = "true"
    policy = json.loads((IN_BUCKET / "policy.json").read_text())
    assert denied(policy, action, f"{BUCKET}/PREFIX/{key}", **context) is is_denied
    assert denied(policy, action, f"{BUCKET}/PREFIX/{key}", SecureTransport="false", **context)
    assert not denied(policy, action, f"{BUCKET}/another/{key}", **context)


def test_what_a_bucket_is_set_to_is_what_s3_takes() -> None:
    s3 = botocore.session.get_session().get_service_model("s3")
    settings = (
        ("policy", "PutBucketPolicy", "Policy"),
        ("versioning", "PutBucketVersioning", "VersioningConfiguration"),
        ("object-lock", "PutObjectLockConfiguration", "ObjectLockConfiguration"),
        ("lifecycle", "PutBucketLifecycleConfiguration", "LifecycleConfiguration"),
    )
    assert {name for name, *_ in settings} == {path.stem for path in IN_BUCKET.glob("*.json")}
    for name, operation, argument in settings:
        text = (IN_BUCKET / f"{name}.json").read_text()
        value = text if name == "policy" else json.loads(text)
        shape = s3.operation_model(operation).input_shape
        found = ParamValidator().validate({"Bucket": "bucket", argument: value}, shape)
        assert not found.has_errors(), found.generate_report()
        unknown = set(value) - set(shape.members[argument].members) if isinstance(value, dict) else set()
        assert not unknown


_ACTIONS = {
    **dict.fromkeys(("HeadBucket", "ListObjectsV2"), "s3:ListBucket"),
    **dict.fromkeys(("GetObject", "HeadObject"), "s3:GetObject"),
    **dict.fromkeys(("CreateMultipartUpload", "UploadPart", "CompleteMultipartUpload"), "s3:PutObject"),
}


@contextmanager
def acting_as(role: str, uri: str) -> Iterator[None]:
    """S3 refuses what the role's policy does not allow, or the bucket's denies, with the answers of AWS."""
    bucket, prefix = uri.removeprefix("s3://").split("/")
    policy, of_bucket = (
        json.loads(path.read_text().replace("BUCKET", bucket).replace("PREFIX", prefix))
        for path in (ROOT / "docs" / "iam" / f"{role}.json", IN_BUCKET / "policy.json")
    )
    call = AioBaseClient._make_api_call

    async def judged(client: Any, operation: str, arguments: dict[str, Any]) -> Any:
        action, key = _ACTIONS.get(operation, f"s3:{operation}"), arguments.get("Key")
        context = {"if_none_match": "*"} if "IfNoneMatch" in arguments else {}
        if operation == "ListObjectsV2":
            context["prefix"] = arguments["Prefix"]
        if action == "s3:PutObject":
            context["ObjectCreationOperation"] = str(operation in ("PutObject", "CompleteMultipartUpload")).lower()
        resource = f"arn:aws:s3:::{bucket}" + (f"/{key}" if key else "")
        if not allowed(policy, action, resource, **context) or denied(of_bucket, action, resource, **context):
            code = "403" if operation.startswith("Head") else "AccessDenied"
            answer = {"Error": {"Code": code, "Message": role}, "ResponseMetadata": {"HTTPStatusCode": 403}}
            raise ClientError(answer, operation)
        return await call(client, operation, arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AioBaseClient, "_make_api_call", judged)
        yield


@pytest.mark.parametrize("size", [1000, 20 * 2**20, 40 * 2**20])
async def test_each_role_can_do_its_work_with_its_policy(on_seaweed: str, size: int) -> None:
    checkpoint = os.urandom(size)
    record = CommitRecord(ledger=on_seaweed, message="m", step=1, loss=None)
    with acting_as("trainer", on_seaweed):
        async with AsyncBlockchainModelStore(on_seaweed) as store:
            content_hash, _ = await store.upload(checkpoint)
            key = f"blobs/{content_hash}.safetensors"
            with pytest.raises(AccessDenied):
                await store.objects.put(key, b"x" * size)
            with pytest.raises(Conflict):
                await store.objects.create(key, b"x" * size)
            with pytest.raises(AccessDenied):
                await store.append_commit(record, content_hash, size)
    with acting_as("ledger", on_seaweed):
        async with AsyncBlockchainModelStore(on_seaweed) as store:
            await store.ledger.prepare()
            await store.append_commit(record, content_hash, size)
            for step in (2, 3):
                another = CommitRecord(ledger=on_seaweed, message="m", step=step, loss=None)
                await store.commit(os.urandom(size), another)
    with acting_as("reader", on_seaweed):
        async with AsyncBlockchainModelStore(on_seaweed) as store:
            first, *_ = await store.list_versions()
            assert await store.load_checkpoint(first) == checkpoint
            assert (await store.verify(blobs=True)).ok
            with pytest.raises(AccessDenied):
                await store.upload(b"x" * size)
    with acting_as("trainer", on_seaweed):
        async with AsyncBlockchainModelStore(on_seaweed) as store:  # what is there and old cannot be written again
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(LIMITS, "young", timedelta(0))
                assert await store.upload(checkpoint) == (content_hash, size)
    with acting_as("collector", on_seaweed):
        async with AsyncBlockchainModelStore(on_seaweed) as store:
            assert (await collect(store, RetentionPolicy(keep_last=1, min_age=timedelta(0)))).deleted == 1
            assert (await store.verify(blobs=True)).ok


@pytest.mark.parametrize("path", POLICIES, ids=lambda path: path.stem)
def test_a_policy_has_the_form_of_one(path: Path) -> None:
    policy = json.loads(path.read_text())
    assert policy["Version"] == "2012-10-17"
    names = [statement["Sid"] for statement in policy["Statement"]]
    assert len(set(names)) == len(names)
    for statement in policy["Statement"]:
        assert set(statement) <= {"Sid", "Effect", "Action", "Resource", "Condition"}
        assert re.fullmatch("[A-Za-z0-9]+", statement["Sid"])
        if statement["Effect"] == "Allow":
            actions = statement["Action"] if isinstance(statement["Action"], list) else [statement["Action"]]
            assert not any("*" in action for action in actions)
    assert len(json.dumps(policy, separators=(",", ":"))) < 6144  # of a managed policy


def test_every_panel_has_a_place_of_its_own() -> None:
    dashboard = json.loads((ROOT / "docs" / "grafana" / "spectralmc.json").read_text())
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for panel in panels
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < 24
    provider = yaml.safe_load((ROOT / "docs" / "grafana" / "provider.yml").read_text())
    assert provider["providers"][0]["type"] == "file"


def test_what_the_tests_ran_with_is_pinned() -> None:
    """An audit has a list to go by: every package that is installed here is in constraints.txt, as it is there."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {re.sub(r"[-_.]+", "-", line.split("==")[0]).lower() for line in lines if "==" in line}
    tools = {"pip", "setuptools", "wheel", "spectralmc"}
    # Where the registry has no torch without CUDA for an interpreter, it brings that along, in versions of its own.
    of_cuda = ("nvidia-", "cuda-", "triton")
    place = sysconfig.get_paths()["purelib"]  # Ray adds some that it brings along to the path
    here = {re.sub(r"[-_.]+", "-", d.metadata["Name"]).lower() for d in metadata.distributions(path=[place])}
    assert {name for name in here if not name.startswith(of_cuda)} - pinned - tools == set()


def test_nothing_is_unpickled() -> None:
    for folder in ("smc", "actors", "jobs"):
        for path in (ROOT / folder).rglob("*.py"):
            text = path.read_text()
            text = text.replace("No pickle", "")
            assert not re.search(r"\bpickle\b|(?<!safetensors\.)torch\.load\(|allow_pickle|joblib", text), path


def test_the_jobs_say_what_they_take(capsys: pytest.CaptureFixture[str]) -> None:
    for job in (train, sweep, node):
        with pytest.raises(SystemExit) as ended:
            job.main(["--help"])
        assert ended.value.code == 0
        assert "usage: python -m jobs." in capsys.readouterr().out
    with pytest.raises(SystemExit) as refused:
        node.main(["--", "ray", "start", "--head"])
    assert refused.value.code == 2
    assert "--block" in capsys.readouterr().err
