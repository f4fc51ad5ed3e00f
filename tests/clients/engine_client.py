"""The gateways' engine contract, with the stubs of the package `smg-grpc-proto`: tokens in, tokens out, the tokenizer's files."""

import hashlib
import importlib.metadata
import io
import sys
import zipfile

import grpc
from smg_grpc_proto.generated import common_pb2, vllm_engine_pb2 as pb, vllm_engine_pb2_grpc as rpc

channel = grpc.insecure_channel(sys.argv[1])
engine = rpc.VllmEngineStub(channel)
assert engine.HealthCheck(pb.HealthCheckRequest()).healthy
model = engine.GetModelInfo(pb.GetModelInfoRequest())
assert model.is_generation and model.vocab_size > 0, model
assert engine.GetLoads(pb.GetLoadsRequest()).loads[0].max_total_num_tokens > 0
assert engine.GetServerInfo(pb.GetServerInfoRequest()).max_num_seqs > 0

pieces = list(engine.GetTokenizer(common_pb2.GetTokenizerRequest()))
archive = b"".join(piece.data for piece in pieces)
assert hashlib.sha256(archive).hexdigest() == pieces[-1].sha256
with zipfile.ZipFile(io.BytesIO(archive)) as files:
    assert files.testzip() is None and "tokenizer.json" in files.namelist(), files.namelist()

request = pb.GenerateRequest(
    request_id="r-1",
    tokenized=pb.TokenizedInput(input_ids=[100, 101, 102]),
    sampling_params=pb.SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, logprobs=1),
    stream=True,
)
messages = list(engine.Generate(request))
streamed = [token for message in messages for token in message.chunk.token_ids]
assert messages[-1].WhichOneof("response") == "complete" and len(streamed) == 8, messages
assert list(messages[-1].complete.output_ids) == streamed and messages[-1].complete.finish_reason == "length"
request.stream = False
(whole,) = engine.Generate(request)
assert list(whole.complete.output_ids) == streamed
# What it cannot do, and what it was not told to do: blocks carry prompts.
refusals = [
    (lambda: engine.Embed(pb.EmbedRequest()), ""),
    (lambda: next(engine.SubscribeKvEvents(common_pb2.SubscribeKvEventsRequest())), "scheduler.kv_events"),
]
for call, named in refusals:
    try:
        call()
        raise AssertionError("it was served")
    except grpc.RpcError as error:
        assert error.code() == grpc.StatusCode.UNIMPLEMENTED and named in error.details(), error
flushed = engine.FlushCache(common_pb2.FlushCacheRequest(timeout_s=5.0))
assert flushed.success and flushed.message.startswith("dropped"), flushed
channel.close()  # here, and not while the interpreter ends
print("smg-grpc-proto", importlib.metadata.version("smg-grpc-proto"), "fine")
