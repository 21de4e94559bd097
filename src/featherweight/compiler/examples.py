"""What is written beside the compiled network: a program that runs it, and for wasm its loader."""

from __future__ import annotations

from typing import Any

import numpy as np

_C = """\
/* Run the network once and print the first numbers of each output:
   cc -O2 main.c {prefix}.c -lm{pthread} && ./a.out {prefix}.weights [INPUT.bin ...]
   An input is a file of its numbers, row-major; without files all are zero. With files the outputs go
   to output_0.bin and so on as well. */
#include <stdio.h>
#include <stdlib.h>
#include "{prefix}.h"

static void *aligned(size_t size) {{
    char *raw = (char *)calloc(1, size + 64);
    if (!raw) exit(1);
    return raw + (64 - (size_t)raw % 64);
}}

static void load(const char *name, void *to, size_t size) {{
    FILE *file = fopen(name, "rb");
    if (!file || fread(to, 1, size, file) != size) {{
        fprintf(stderr, "%s: cannot read %lu bytes\\n", name, (unsigned long)size);
        exit(2);
    }}
    fclose(file);
}}

static void save(int index, const void *from, size_t size) {{
    char name[32];
    FILE *file;
    sprintf(name, "output_%d.bin", index);
    file = fopen(name, "wb");
    if (!file || fwrite(from, 1, size, file) != size || fclose(file)) {{
        fprintf(stderr, "%s: cannot write %lu bytes\\n", name, (unsigned long)size);
        exit(1);
    }}
}}

int main(int count, char **words) {{
    static const size_t in_bytes[] = {{{in_bytes}}}, out_bytes[] = {{{out_bytes}}};
    const void *inputs[{macro}_INPUTS + 1];
    void *outputs[{macro}_OUTPUTS + 1];
    void *weights = aligned({macro}_WEIGHTS_BYTES);
    {prefix}_context *context;
    const int given = count > 2 || !{macro}_INPUTS;
    int i, k;
    if (count != 2 && count != 2 + {macro}_INPUTS) {{
        fprintf(stderr, "usage: %s {prefix}.weights [INPUT.bin ...]\\n", words[0]);
        return 2;
    }}
    load(words[1], weights, {macro}_WEIGHTS_BYTES);
    for (i = 0; i < {macro}_INPUTS; i++) {{
        inputs[i] = aligned(in_bytes[i]);
        if (given) load(words[2 + i], (void *)inputs[i], in_bytes[i]);
    }}
    for (i = 0; i < {macro}_OUTPUTS; i++) outputs[i] = aligned(out_bytes[i]);
    context = {prefix}_init(aligned({macro}_CONTEXT_BYTES), weights);
    {prefix}_run(context, inputs, outputs);
    for (i = 0; i < {macro}_OUTPUTS; i++) {{
        printf("output %d:", i);
        for (k = 0; k < 5 && (k + 1) * sizeof(float) <= out_bytes[i]; k++)
            printf(" %g", (double)((float *)outputs[i])[k]);
        printf("\\n");
        if (given) save(i, outputs[i], out_bytes[i]);
    }}
    {prefix}_close(context);
    return 0;
}}
"""

_LOADER = """\
// Runs {prefix}.wasm in a browser or under Node.
//
//   import {{ open }} from "./{prefix}.mjs";
//   const network = await open(wasmBytes, weightsBytes);
//   const [first] = network.run([new Float32Array(...)]);
//
// `network.inputs` and `network.outputs` list name, type and shape; arrays are row-major, in that order.
// BigInt64Array holds int64, Uint8Array bool. One network is one context: make another for a second worker.

const ARRAYS = {{
  float32: Float32Array, float64: Float64Array, bool: Uint8Array, int8: Int8Array, uint8: Uint8Array,
  int16: Int16Array, uint16: Uint16Array, int32: Int32Array, uint32: Uint32Array,
  int64: BigInt64Array, uint64: BigUint64Array,
}};
const PAGE = 65536;
const count = (entry) => entry.shape.reduce((size, axis) => size * axis, 1);
const bytes = (entry) => count(entry) * ARRAYS[entry.type].BYTES_PER_ELEMENT;

export async function open(wasm, weights) {{
  const {{ instance }} = await WebAssembly.instantiate(wasm, {{}});
  const code = instance.exports, memory = code.memory;
  const start = code.{prefix}_description(), raw = new Uint8Array(memory.buffer);
  const text = new TextDecoder().decode(raw.subarray(start, raw.indexOf(0, start)));
  const description = JSON.parse(text);
  if (weights.byteLength !== description.weights_bytes)
    throw new Error(`weights have ${{weights.byteLength}} bytes, expected ${{description.weights_bytes}}`);

  let top = code.__heap_base.value;
  const place = (size) => {{
    const at = Math.ceil(top / 64) * 64;
    top = at + size;
    return at;
  }};
  const {{ inputs, outputs }} = description;
  const weightsAt = place(description.weights_bytes), contextAt = place(description.context_bytes);
  const inAt = inputs.map((entry) => place(bytes(entry)));
  const outAt = outputs.map((entry) => place(bytes(entry)));
  const inTable = place(4 * inputs.length + 4), outTable = place(4 * outputs.length + 4);
  const missing = Math.ceil((top + 64 - memory.buffer.byteLength) / PAGE);
  if (missing > 0) memory.grow(missing);
  const given = [weights.buffer ?? weights, weights.byteOffset ?? 0, weights.byteLength];
  new Uint8Array(memory.buffer).set(new Uint8Array(...given), weightsAt);
  new Uint32Array(memory.buffer, inTable, inputs.length).set(inAt);
  new Uint32Array(memory.buffer, outTable, outputs.length).set(outAt);
  const context = code.{prefix}_init(contextAt, weightsAt);

  const run = (arrays) => {{
    if (arrays.length !== inputs.length)
      throw new Error(`${{arrays.length}} arrays for ${{inputs.length}} inputs`);
    inputs.forEach((entry, i) => {{
      const Kind = ARRAYS[entry.type];
      if (!(arrays[i] instanceof Kind) || arrays[i].length !== count(entry))
        throw new Error(`input '${{entry.name}}' must be a ${{Kind.name}} of ${{count(entry)}} numbers`);
      new Kind(memory.buffer, inAt[i], count(entry)).set(arrays[i]);
    }});
    code.{prefix}_run(context, inTable, outTable);
    return outputs.map((entry, i) => new ARRAYS[entry.type](memory.buffer, outAt[i], count(entry)).slice());
  }};
  return {{ description, inputs, outputs, run, arrayOf: (entry) => ARRAYS[entry.type] }};
}}
"""

_JS = """\
// Run the network once under Node and print the first numbers of each output:
//   node main.mjs [INPUT.bin ...]
// An input is a file of its numbers, row-major; without files all are zero. With files the outputs go
// to output_0.bin and so on as well.
import {{ readFileSync, writeFileSync }} from "node:fs";
import {{ open }} from "./{prefix}.mjs";

const beside = (name) => readFileSync(new URL(name, import.meta.url));
const network = await open(beside("{prefix}.wasm"), beside("{prefix}.weights"));
const files = process.argv.slice(2);
const given = files.length > 0 || network.inputs.length === 0;
const inputs = network.inputs.map((entry, i) => {{
  const Kind = network.arrayOf(entry);
  if (given) return new Kind(Uint8Array.from(readFileSync(files[i])).buffer);
  return new Kind(entry.shape.reduce((size, axis) => size * axis, 1));
}});
network.run(inputs).forEach((values, i) => {{
  console.log(`output ${{i}}:`, ...values.slice(0, 5));
  if (given) writeFileSync(`output_${{i}}.bin`, values);
}});
"""


def example_files(
    description: dict[str, Any], prefix: str = "model", threads: int = 1, wasm: bool = False
) -> dict[str, str]:
    """Return the texts of the example program by file name; for wasm the loader is one of them.

    Args:
        description: the network's, as `describe` gives it.
        prefix: name of the network's files and functions.
        threads: more than one needs pthread.
        wasm: whether the network is a module of WebAssembly.
    """
    if wasm:
        return {f"{prefix}.mjs": _LOADER.format(prefix=prefix), "main.mjs": _JS.format(prefix=prefix)}

    def sizes(kind: str) -> str:
        entries = description[kind]
        found = [
            int(np.prod(entry["shape"], dtype=np.int64)) * np.dtype(entry["type"]).itemsize
            for entry in entries
        ]
        return ", ".join(map(str, found)) or "0"

    program = _C.format(
        prefix=prefix,
        macro=prefix.upper(),
        pthread=" -pthread" if threads > 1 else "",
        in_bytes=sizes("inputs"),
        out_bytes=sizes("outputs"),
    )
    return {"main.c": program}
