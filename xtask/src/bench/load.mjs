// Loads a GGUF file with llama.cpp, computes one token, and says what that took. Arguments: the file, the context's length.

import { readFileSync } from "node:fs";
import { getLlama } from "node-llama-cpp";

const [file, context] = process.argv.slice(-2);
const begin = performance.now();
const llama = await getLlama({ gpu: false, build: "never", logLevel: "error" });
const model = await llama.loadModel({ modelPath: file, gpuLayers: 0 });
const sequence = (await model.createContext({ contextSize: Number(context) })).getSequence();
const ready = performance.now() - begin;
for await (const _ of sequence.evaluate([60])) break;
const token = performance.now() - begin;
const [, peak] = readFileSync("/proc/self/status", "utf8").match(/VmHWM:\s+(\d+) kB/);
const whole = performance.now() - begin;
process.stdout.write(JSON.stringify({ ready, token, whole, peak_kib: Number(peak) }), () => process.exit(0));
