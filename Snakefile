# Order and parallel execution only. What has to be done is decided by `mia_utils.runner.run`, which looks at the artifacts
# and writes build/<profile>/plan.json; start it with `./run_all.sh PROFILE [-- ENGINE_ARGS]`.
# Outputs are markers, never the executed notebooks: the engine deletes the output of a rule that failed.
import json

# the working directory is build/<profile>: no rule has a path in it, which may hold braces
with open(config["plan"]) as file:
    PLAN = json.load(file)
PYTHON = PLAN["python"]


rule all:
    input:
        [f"{job}.done" for job in PLAN["jobs"]],


for index, (job, work) in enumerate(PLAN["jobs"].items()):

    rule:
        name:
            f"{work['kind']}_{index}"
        input:
            [f"{name}.done" for name in work["needs"]],
        output:
            touch(f"{job}.done"),
        params:
            job=job,
        threads: 1
        # the first row and the notebook that needs only it go before everything else: the first finding comes early
        priority: work["priority"]
        resources:
            gpu=int(work["kind"] != "data"),
        shell:
            "{PYTHON:q} -m mia_utils.runner.warm mia_utils.runner.jobs plan.json {params.job:q}"
