// Lets Python call the playground's own JavaScript: `node tests/playground.mjs FOLDER < calls.json`, where FOLDER is the
// page as it was built and a call is [name, ...arguments]; prints the list of results.

import { readFileSync } from 'node:fs'
import { resolve } from 'node:path'
import { pathToFileURL } from 'node:url'

const folder = resolve(process.argv[2]), file = name => pathToFileURL(`${folder}/${name}`)
const load = name => import(file(name))
const options = JSON.parse(readFileSync(`${folder}/model.json`))
const [random, schedulers, tokens, words, settings, pixels, pipeline] = await Promise.all(
  ['random', 'schedulers', 'tokenizer', 'words', 'settings', 'pixels', 'pipeline'].map(name => load(`${name}.js`)))
const tokenizer = new tokens.Tokenizer(options.scenes), floats = x => Float32Array.from(x)
const fromWeb = globalThis.fetch
globalThis.fetch = async (url, ...rest) => url.protocol == 'file:' ? new Response(readFileSync(url)) : fromWeb(url, ...rest)

const models = {}
async function model(mode) {
  return models[mode] ??= await (await load('models.js')).load(options[mode], () => {})
}

const calls = {
  // each draw after the other, from one generator
  randn(seed, ...counts) {
    const generator = new random.Generator(seed)
    return counts.map(n => generator.randn(n))
  },
  rows: text => tokens.tokenRows(tokenizer, text),
  weights: tokens.parseWeights,
  unknown: text => words.unknownWords(tokenizer, text),
  remarks: text => words.remarks(options.scenes.grammar, tokenizer, text),
  prompts: n => Array.from({ length: n }, () => words.anyPrompt(options.scenes.grammar)),
  curve: mode => schedulers.alphasCumprod(options[mode].scheduler),
  // the timesteps of n steps, and what becomes of x from step `begin` on when the model answers vs
  steps(mode, name, n, { begin, x0, eps, vs, seed }) {
    const plan = new schedulers[name](options[mode].scheduler, n), generator = new random.Generator(seed), found = []
    let x = plan.addNoise(floats(x0), floats(eps), begin)
    vs.forEach((v, i) => {
      const seen = plan.scale(x, begin + i), { x0, eps } = plan.parts(seen, floats(v), begin + i)
      x = plan.step(floats(v), begin + i, x, generator)
      found.push({ seen, x0, eps, x })
    })
    return { timesteps: plan.timesteps, initNoiseSigma: plan.initNoiseSigma, found }
  },
  plan: (mode, name, n) => new schedulers[name](options[mode].scheduler, n).timesteps,
  read: (search, hash) => settings.readAddress({ search, hash }),
  write: settings.writeHash,
  python: settings.asPython,
  // every step, and the finished picture
  async draw({ image, latents, ...wish }) {
    const made = await model(wish.mode), found = []
    const tensors = { image: image && pixels.toTensor({ data: image }), latents: latents && floats(latents) }
    for await (const step of pipeline.denoise(made, { ...wish, ...tensors })) found.push(step)
    const { x } = found.at(-1), picture = wish.mode == 'digits' ? pixels.digits(x) : pixels.colours(await pipeline.decode(made, x))
    return { steps: found, picture, falseColours: wish.mode == 'digits' ? null : pixels.falseColours(x) }
  },
}

const results = []
for (const [name, ...args] of JSON.parse(readFileSync(0))) {
  const result = (async () => calls[name](...args))()
  results.push(await result.catch(e => ({ error: `${e.name}: ${e.message}` })))
}
process.stdout.write(JSON.stringify(results, (_, value) => ArrayBuffer.isView(value) ? Array.from(value) : value))
