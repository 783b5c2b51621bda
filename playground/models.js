// The model's parts as ONNX files, run by onnxruntime-web: WebAssembly, one thread. A tensor is a Float32Array.

import * as ort from './ort.wasm.bundle.min.mjs'
import { Tokenizer } from './tokenizer.js'

// A file's bytes, unpacked. Raises an Error that names the file
async function read({ url, bytes }, report) {
  const failed = why => new Error(`${url.split('?')[0]} could not be loaded: ${why}`)
  const answer = await fetch(new URL(url, import.meta.url)).catch(e => { throw failed(e.message) })
  if (!answer.ok) throw failed(`the server answered ${answer.status}`)
  const reader = answer.body.getReader(), parts = []
  for (;;) {
    const { done, value } = await reader.read().catch(e => { throw failed(e.message) })
    if (done) break
    parts.push(value)
    report(value.length)
  }
  const file = new Blob(parts), start = new Uint8Array(await file.slice(0, 2).arrayBuffer())
  if (start[0] != 0x1f || start[1] != 0x8b) return new Uint8Array(await file.arrayBuffer())  // a server has unpacked it
  if (file.size != bytes) throw failed(`it has ${file.size} bytes, and should have ${bytes}`)
  const unpacked = file.stream().pipeThrough(new DecompressionStream('gzip'))
  return new Uint8Array(await new Response(unpacked).arrayBuffer())
}

const floats = (data, ...shape) => new ort.Tensor('float32', data, shape)
const whole = (data, ...shape) => new ort.Tensor('int32', Int32Array.from(data), shape)
const run = async (session, inputs) => (await session.run(inputs))[session.outputNames[0]].data

// A model for pipeline.js, of what the build wrote down in model.json; `report` is told of each bytes that came
export async function load(options, report) {
  const { files, latents } = options, start = bytes => ort.InferenceSession.create(bytes)
  report(files.runtime.bytes)  // it came with this module
  const [wasm, ...parts] = await Promise.all(['wasm', 'unet', 'text_encoder', 'vae_decoder'].filter(name => files[name])
    .map(name => read(files[name], report)))
  Object.assign(ort.env.wasm, { wasmBinary: wasm, numThreads: 1 })
  const [unet, reader, decoder] = [await start(parts[0]), parts[1] && await start(parts[1]), parts[2] && await start(parts[2])]
  const model = { ...options, size: latents.reduce((a, b) => a * b) }
  const ask = (x, t, told) => run(unet, { sample: floats(x, x.length / model.size, ...latents), timestep: floats([t], 1), ...told })
  if (!reader) return { ...model, predict: (x, t, labels) => ask(x, t, { class_labels: whole(labels.flat(), labels.flat().length) }) }

  const { width, model_max_length } = options, pixels = latents.slice(1).map(n => n * options.factor)
  let encoder  // loaded when a picture is given for the first time
  return { ...model, tokenizer: new Tokenizer(options),
    predict: (x, t, texts) => ask(x, t, { encoder_hidden_states:
      floats(texts.flatMap(v => Array.from(v)), texts.length, texts[0].length / width, width) }),
    read: rows => run(reader, { input_ids: whole(rows.flat(), rows.length, model_max_length) }),
    decode: x => run(decoder, { latent_sample: floats(x, 1, ...latents) }),
    async encode(picture) {
      encoder ??= await start(await read(files.vae_encoder, () => {}))
      const parameters = await run(encoder, { sample: floats(picture, 1, 3, ...pixels) })
      const std = parameters.slice(model.size).map(x => Math.exp(Math.min(20, Math.max(-30, x)) / 2))
      return { mean: parameters.slice(0, model.size), std }
    } }
}
