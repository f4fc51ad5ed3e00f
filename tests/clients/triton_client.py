"""Triton's gRPC client against a running server: what it says of itself, ModelInfer, and a stream of answers."""

import importlib.metadata
import queue
import sys

import numpy
import tritonclient.grpc as triton

client = triton.InferenceServerClient(sys.argv[1])
assert client.is_server_live() and client.is_server_ready()
model = client.get_model_repository_index().models[0].name
assert client.is_model_ready(model) and not client.is_model_ready("no-such-model")
metadata = client.get_model_metadata(model)
assert [tensor.name for tensor in metadata.outputs] == ["text_output"], metadata
assert client.get_model_config(model).config.model_transaction_policy.decoupled


def texts(*values):
    tensor = triton.InferInput("text_input", [len(values)], "BYTES")
    tensor.set_data_from_numpy(numpy.array([value.encode() for value in values], dtype=numpy.object_))
    return tensor


def ask(name, values):
    return {"model_name": model, "inputs": [texts(*values)], "request_id": name, "parameters": {"max_tokens": 12, "temperature": 0.0}}


answer = client.infer(**ask("one", ["Once upon a time", "The fox"])).as_numpy("text_output")
assert answer.shape == (2,) and all(answer), answer

results = queue.Queue()
client.start_stream(callback=lambda result, error: results.put((result, error)))
client.async_stream_infer(**ask("two", ["Once upon a time"]))
pieces = []
while True:
    result, error = results.get(timeout=60)
    assert error is None, error
    pieces.append(result.as_numpy("text_output")[0])
    if result.get_response().parameters["triton_final_response"].bool_param:
        break
client.stop_stream()
client.close()  # here, where its threads can still be waited for, and not while the interpreter ends
assert b"".join(pieces) == answer[0], (pieces, answer)
print("tritonclient", importlib.metadata.version("tritonclient"), "fine")
