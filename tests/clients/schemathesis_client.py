"""schemathesis over the served description: a bounded number of requests from a fixed seed, valid and not, and no answer that is
a server's fault or not as described."""

import importlib.metadata
import os
import subprocess
import sys
import tempfile

# What the description leaves open (what a list holds, which names a text may be) can be refused with 400: a check for that is left out.
checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance,negative_data_rejection"
with tempfile.TemporaryDirectory() as folder:
    command = [
        os.path.join(os.path.dirname(sys.executable), "schemathesis"), "run", f"{sys.argv[1]}/openapi.json", "--checks", checks,
        "--phases", "coverage,fuzzing", "--max-examples", "5", "--max-time", "8", "--generation-deterministic", "--no-shrink",
        "--request-timeout", "10", "--no-color", "--suppress-health-check", "all", "--warnings", "off",
    ]
    # What it keeps for a next time goes with the folder.
    ran = subprocess.run(command, capture_output=True, text=True, cwd=folder)
cases = [line.strip() for line in ran.stdout.splitlines() if " generated" in line]
assert ran.returncode == 0 and cases, f"{ran.stdout}\n{ran.stderr}"
print("schemathesis", importlib.metadata.version("schemathesis"), "fine:", cases[-1])
