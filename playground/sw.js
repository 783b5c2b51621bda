// Keeps what the page has loaded, so that it works offline. A file whose address names its version is never asked for
// again; of all others the server's is shown as long as there is one.

const NAME = 'sdcourse-playground'
const PAGE = ['./', 'index.html', 'style.css', 'page.js', 'board.js', 'settings.js', 'words.js', 'pixels.js', 'tokenizer.js',
  'random.js', 'worker.js', 'models.js', 'pipeline.js', 'schedulers.js', 'ort.wasm.bundle.min.mjs', 'model.json']

addEventListener('install', event => {
  skipWaiting()
  event.waitUntil(caches.open(NAME).then(cache => cache.addAll(PAGE)))
})
addEventListener('activate', event => event.waitUntil(clients.claim()))

async function keep(cache, request, fresh, versioned) {
  if (versioned) await cache.delete(request, { ignoreSearch: true })  // an older version
  await cache.put(versioned ? request : new URL(request.url).pathname, fresh)
}

async function answer(event) {
  const { request } = event, url = new URL(request.url), cache = await caches.open(NAME), versioned = url.searchParams.has('v')
  const kept = await cache.match(request, { ignoreSearch: !versioned })
  if (versioned && kept) return kept
  try {
    const fresh = await fetch(request)
    // beside the answer, so that the page sees its bytes arrive, and a full storage spoils nothing
    if (fresh.ok) event.waitUntil(keep(cache, request, fresh.clone(), versioned).catch(() => {}))
    return fresh
  } catch (e) {
    if (kept) return kept
    throw e
  }
}

addEventListener('fetch', event => {
  const { method, url } = event.request
  if (method == 'GET' && url.startsWith(registration.scope)) event.respondWith(answer(event))
})
