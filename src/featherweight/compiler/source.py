"""Join the steps to one C file and its header: kernels, one function a step, the table that runs them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from featherweight.compiler.ctype import CType
from featherweight.compiler.graph import Graph
from featherweight.compiler.program import Program, Step, View

KERNELS = Path(__file__).parent / "kernels"
CONTEXT_BYTES = 4096
"""Room before the arena for the context itself, its team of threads included."""

_HEADER = """\
/* {title}: written by featherweight's compiler. */
#ifndef {guard}
#define {guard}
#include <stddef.h>
#ifdef __cplusplus
extern "C" {{
#endif
{signature}
#define {macro}_INPUTS {inputs}
#define {macro}_OUTPUTS {outputs}
#define {macro}_STEPS {steps}
#define {macro}_CONTEXT_BYTES {context}ul /* memory of one context, its arena included */
#define {macro}_WEIGHTS_BYTES {weights}ul /* size of the weights file */

typedef struct {p}_context {p}_context;

/* Make a context in `memory`: {macro}_CONTEXT_BYTES bytes, aligned to 64. `weights` are the contents of the
   weights file, aligned to 64, and must outlive the context. Nothing is allocated later. */
{p}_context *{p}_init(void *memory, const void *weights);

/* Compute the outputs. Every array is row-major; the order and shapes are those above. */
void {p}_run({p}_context *context, const void *const *inputs, void *const *outputs);

/* Run the steps first <= i < last only, to time them one by one. */
void {p}_run_steps({p}_context *context, const void *const *inputs, void *const *outputs, int first,
               int last);

/* End the context's threads, if it has any. */
void {p}_close({p}_context *context);

/* The network's description as JSON. */
const char *{p}_description(void);

#ifdef __cplusplus
}}
#endif
#endif
"""

_POSIX = "#define _POSIX_C_SOURCE 200809L\n"
_PRELUDE = """\
/* {title}: written by featherweight's compiler. Compile with any C99 compiler; see {p}.h. */
#include "{p}.h"
#include <limits.h>
#include <math.h>
#include <stdint.h>
#include <string.h>
"""

_CONTEXT = """\
struct {p}_context {{
    unsigned char *arena;
    const unsigned char *weights;
    const unsigned char *const *inputs;
    unsigned char *const *outputs;
{team}}};
typedef struct {p}_context fw_context;
"""

_TABLE = """\
typedef void (*fw_step)(const fw_context *, int, int);
static const fw_step fw_steps[] = {{{names}}};

{p}_context *{p}_init(void *memory, const void *weights) {{
    fw_context *c = (fw_context *)memory;
    c->arena = (unsigned char *)memory + {context};
    c->weights = (const unsigned char *)weights;
    {start}
    return c;
}}

void {p}_run_steps({p}_context *c, const void *const *inputs, void *const *outputs, int first, int last) {{
    c->inputs = (const unsigned char *const *)inputs;
    c->outputs = (unsigned char *const *)outputs;
    {run}
}}

void {p}_close({p}_context *c) {{ {stop} }}
"""

_WORK = """\
static void fw_work(void *context, int step, int tid, int threads);
"""

_TEAM_WORK = """\
static void fw_work(void *context, int step, int tid, int threads) {
    fw_steps[step]((const fw_context *)context, tid, threads);
}
"""

_COMMON = """\
void {p}_run({p}_context *c, const void *const *inputs, void *const *outputs) {{
    {p}_run_steps(c, inputs, outputs, 0, {steps});
}}

const char *{p}_description(void) {{
    return {description};
}}
"""


def describe(graph: Graph, program: Program, arena_bytes: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Return what a caller must know: inputs, outputs, sizes in bytes, target and threads."""

    def entries(names: list[str]) -> list[dict[str, Any]]:
        return [
            {"name": name, "shape": list(graph.shape(name)), "type": graph.dtype(name).name} for name in names
        ]

    return {
        "name": graph.name,
        "inputs": entries(graph.inputs),
        "outputs": entries(graph.outputs),
        "steps": len(program.steps),
        "arena_bytes": arena_bytes,
        "context_bytes": CONTEXT_BYTES + arena_bytes,
        "weights_bytes": len(program.weights),
        **settings,
    }


def write_header(description: dict[str, Any], prefix: str = "model") -> str:
    """Return model.h."""
    lines = ["/*"]
    for kind in ("inputs", "outputs"):
        for index, entry in enumerate(description[kind]):
            shape = "x".join(map(str, entry["shape"])) or "scalar"
            lines.append(f"   {kind}[{index}]: {_comment(entry['name'])}, {entry['type']}, {shape}")
    return _HEADER.format(
        title=_comment(description["name"]),
        guard=f"{prefix.upper()}_H",
        macro=prefix.upper(),
        p=prefix,
        signature="\n".join([*lines, "*/"]),
        inputs=len(description["inputs"]),
        outputs=len(description["outputs"]),
        steps=description["steps"],
        context=description["context_bytes"],
        weights=description["weights_bytes"],
    )


def write_source(
    program: Program, description: dict[str, Any], prefix: str = "model", threads: int = 1
) -> str:
    """Return model.c: everything but the weights."""
    team = threads > 1
    parts = [_POSIX] if team else []
    parts.append(_PRELUDE.format(title=_comment(description["name"]), p=prefix))
    parts += [kernel_text(name) for name in ["base.h", *program.headers]]
    if team:
        parts += [f"#define FW_THREADS {threads}", kernel_text("team.h"), _WORK]
    parts.append(_CONTEXT.format(p=prefix, team="    fw_team team;\n" if team else ""))
    parts += program.globals
    parts += [_function(program, step, index) for index, step in enumerate(program.steps)]
    names = ", ".join(f"step_{index}" for index in range(len(program.steps))) or "0"
    parts.append(
        _TABLE.format(
            p=prefix,
            names=names,
            context=CONTEXT_BYTES,
            start="fw_team_start(&c->team, c, fw_work);" if team else "",
            run="fw_team_run(&c->team, first, last);"
            if team
            else "for (; first < last; first++) fw_steps[first](c, 0, 1);",
            stop="fw_team_stop(&c->team);" if team else "(void)c;",
        )
    )
    parts += [_TEAM_WORK] if team else []
    parts.append(
        _COMMON.format(
            p=prefix, steps=len(program.steps), description=_c_string(json.dumps(description, sort_keys=True))
        )
    )
    return "\n".join(parts)


def _function(program: Program, step: Step, index: int) -> str:
    lines = [f"/* {_comment(step.op)}: {_comment(step.name)} ({step.kernel}) */"]
    lines.append(f"static void step_{index}(const fw_context *c, int tid, int threads) {{")
    body = "\n".join(step.lines)
    for var, view, restrict in step.pointers:
        if re.search(rf"\b{var}\b", body):
            lines.append("    " + _pointer(program, var, view, restrict))
    lines.append("    (void)c, (void)tid, (void)threads;")
    return "\n".join([*lines, body, "}", ""])


def _pointer(program: Program, var: str, view: View, restrict: bool) -> str:
    storage = program.storages[view.storage]
    name = CType(view.dtype).name
    qualifier = "restrict " if restrict else ""
    offset = f" + {view.offset}" if view.offset else ""
    if storage.place == "arena":
        return f"{name} *{qualifier}{var} = ({name} *)(void *)(c->arena + {storage.offset}){offset};"
    if storage.place == "output":
        return f"{name} *{qualifier}{var} = ({name} *)(void *)c->outputs[{storage.offset}]{offset};"
    base = f"c->weights + {storage.offset}" if storage.place == "weights" else f"c->inputs[{storage.offset}]"
    return f"const {name} *{qualifier}{var} = (const {name} *)(const void *)({base}){offset};"


def kernel_text(name: str) -> str:
    """Return a kernel header's text without its include guard's need: it stands once in the source."""
    text = (KERNELS / name).read_text(encoding="utf-8")
    return re.sub(r'^#include "[^"]*"\n', "", text, flags=re.MULTILINE)


def _comment(text: str) -> str:
    """Return text that cannot end a C comment or leave ASCII."""
    clean = "".join(char if 32 <= ord(char) < 127 else "?" for char in text)
    return clean.replace("*/", "* /").replace("/*", "/ *").replace("??", "?")[:120]


def _c_string(text: str) -> str:
    """Return text as C string literals, a piece of it a line."""
    pieces = [text[start : start + 80] for start in range(0, len(text), 80)] or [""]
    escaped = []
    for piece in pieces:
        body = piece.replace("\\", "\\\\").replace('"', '\\"').replace("?", "\\?")
        escaped.append(f'"{body}"')
    return "\n        ".join(escaped)
