// Draws beside the page, so that it stays alive. Only the newest wish counts: it ends the work on another between two steps.

import { load } from './models.js'
import { decode, denoise } from './pipeline.js'
import { colours, digits, falseColours } from './pixels.js'

let model, newest, work = Promise.resolve()

// Let messages in
const breathe = () => new Promise(resolve => {
  const { port1, port2 } = new MessageChannel()
  port1.onmessage = () => { port1.close(); resolve() }
  port2.postMessage(0)
})

async function draw({ id, settings }) {
  const began = performance.now(), scenes = settings.mode == 'scenes', show = scenes ? falseColours : digits
  for await (const { i, of, t, rates, seen, x, x0, eps } of denoise(model, settings)) {
    const large = i == of - 1 ? x : settings.view == 'xt' ? seen : x0
    const picture = scenes ? colours(await decode(model, large)) : digits(large)
    if (id != newest) return
    postMessage({ id, i, of, t, rates, picture, xt: show(seen), x0: show(x0), eps: show(eps) })
    await breathe()
    if (id != newest) return
  }
  postMessage({ id, seconds: (performance.now() - began) / 1000 })
}

onmessage = ({ data }) => {
  if (data.load) {
    const report = loaded => postMessage({ loaded })
    load(data.load, report).then(made => { model = made; postMessage({ ready: true }) }, e => postMessage({ failed: e.message }))
  } else {
    newest = data.id
    work = work.then(() => data.id == newest && draw(data)).catch(e => postMessage({ id: data.id, failed: e.message }))
  }
}
