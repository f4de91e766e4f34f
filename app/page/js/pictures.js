// A picture dropped anywhere on the page goes to the box that restores settings; no drop leaves the page, but text may
// be dropped where text is written. A box for files that takes the drop itself has done so by now.
document.addEventListener('dragover', (event) => {
  if (event.dataTransfer?.types.includes('Files')) event.preventDefault()
})
document.addEventListener('drop', (event) => {
  const files = event.dataTransfer?.files
  if (!files?.length && event.target.closest('input, textarea')) return
  event.preventDefault()
  const box = document.querySelector('#restore input[type=file]')
  if (!files?.length || !box || event.target.closest('.block')?.querySelector('input[type=file]')) return
  box.files = files
  box.dispatchEvent(new Event('change', { bubbles: true }))
})

// While the button is held, the picture is the last that was drawn, or, if that is shown, the one before it.
let shown = null
function hold(event) {
  const button = event.target.closest?.('#hold')
  const picture = document.querySelector('#picture img')
  if (!button || !picture || shown || (event.key && event.key !== ' ' && event.key !== 'Enter')) return
  const drawn = [...document.querySelectorAll('#gallery .thumbnail-item img')].map((each) => each.src)
  const other = drawn[0] === picture.src ? drawn[1] : drawn[0]
  if (!other) return
  shown = picture.src
  picture.src = other
}
function release() {
  const picture = document.querySelector('#picture img')
  if (shown && picture) picture.src = shown
  shown = null
}
for (const pressed of ['pointerdown', 'keydown']) document.addEventListener(pressed, hold)
for (const let_go of ['pointerup', 'pointercancel', 'keyup', 'blur']) window.addEventListener(let_go, release)

// What a click changes is undone by itself, however soon it came after another change: see browser_memory.py.
document.addEventListener('click', () => { window.shiraChanged = 0 }, true)
