// The list of styles: built once for each list of cards, in the DOM alone, since names and words come from strangers.
// props.value is the mix {name: strength}; props.cards, .live and .limits come from the server.
const cards = element.querySelector('.rack-cards')
const filter = element.querySelector('.rack-filter')
const count = element.querySelector('.rack-count')
const rows = new Map()
const PARTS = ['down', 'mid', 'up']

function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag)
  for (const [name, value] of Object.entries(attributes)) {
    if (name === 'text') node.textContent = value
    else if (name.startsWith('on')) node.addEventListener(name.slice(2), value)
    else if (value !== null && value !== false) node.setAttribute(name, value === true ? '' : value)
  }
  node.append(...children.filter(Boolean))
  return node
}

function dial(label, set, small) {
  const limits = { min: props.limits[0], max: props.limits[1], step: 0.05 }
  const range = make('input', { type: 'range', ...limits, 'aria-label': label })
  const number = make('input', { type: 'number', ...limits, 'aria-label': label + ', as a number' })
  range.addEventListener('input', () => { number.value = range.value; set(Number(range.value)) })
  number.addEventListener('change', () => {
    const value = Math.min(limits.max, Math.max(limits.min, Number(number.value) || 0))
    number.value = range.value = value
    set(value)
  })
  const show = (value, mixed) => {
    range.value = value
    number.value = mixed ? '' : value
    number.placeholder = mixed ? 'parts' : ''
  }
  return { node: make('div', { class: small ? 'dial small' : 'dial' }, range, number), show }
}

let waiting = null
function tell() {
  props.value = Object.fromEntries([...rows].filter(([, row]) => row.on.checked).map(([name, row]) => [name, row.strength]))
  recount()
  if (!props.live) return
  waiting ??= setTimeout(() => { waiting = null; trigger('input') }, 120)
}

function recount() {
  const on = [...rows.values()].filter((row) => row.on.checked).length
  count.textContent = `${on} of ${rows.size} on`
}

// a strength is a number, or {component: number}, or {component: {down, mid, up}}; what is left out is 1
function partOf(strength, component, part) {
  const of = typeof strength === 'object' ? strength[component] ?? 1 : strength
  return typeof of === 'object' ? of[part] ?? 1 : of
}

function simplest(parts) {
  for (const [component, value] of Object.entries(parts)) {
    if (typeof value === 'object' && PARTS.every((part) => value[part] === value.down)) parts[component] = value.down
  }
  const values = Object.values(parts)
  return values.every((value) => typeof value === 'number' && value === values[0]) ? values[0] : parts
}

function advanced(card, row) {
  const blocks = (component) => (props.blocked.includes(component) ? PARTS : [null])
  const dials = card.components.flatMap((component) => blocks(component).map((part) => ({ component, part })))
  const collect = (changed, value) => {
    const parts = {}
    for (const each of dials) {
      const now = each === changed ? value : partOf(row.strength, each.component, each.part)
      if (each.part === null) parts[each.component] = now
      else parts[each.component] = { ...parts[each.component], [each.part]: now }
    }
    row.set(simplest(parts))
  }
  const lines = dials.map((each) => {
    const words = each.part ? `${each.component} ${each.part}` : each.component
    each.dial = dial(`strength of ${card.name} in ${words}`, (value) => collect(each, value), true)
    return make('div', { class: 'part' }, make('span', { text: words.replaceAll('_', ' ') }), each.dial.node)
  })
  row.showParts = () => dials.forEach((each) => each.dial.show(partOf(row.strength, each.component, each.part)))
  row.showParts()
  return lines
}

function build(card) {
  const row = { strength: 1, showParts() {} }
  row.on = make('input', { type: 'checkbox', id: `on-${card.name}`, 'aria-label': card.name, onchange: () => { paint(); tell() } })
  const main = dial(`strength of ${card.name}`, (value) => row.set(value))
  const fold = make('details', { class: 'parts' }, make('summary', { text: 'by part', 'aria-label': `strength of ${card.name} by part of the model` }))
  fold.addEventListener('toggle', () => { if (fold.open && fold.children.length === 1) fold.append(...advanced(card, row)) })
  const picture = card.thumbnail
    ? make('img', { src: card.thumbnail, alt: '', loading: 'lazy', width: 56, height: 56 })
    : make('span', { class: 'no-thumbnail', text: card.name.slice(0, 1).toUpperCase(), 'aria-hidden': 'true' })
  const words = card.trigger && make('button', { type: 'button', class: 'words', title: 'put these words into the prompt', 'aria-label': `use the words “${card.trigger}”`, text: `+ ${card.trigger}`, onclick: () => trigger('words', { words: card.trigger }) })
  const paint = () => row.node.classList.toggle('on', row.on.checked)
  row.show = (strength) => {
    row.strength = strength
    const mixed = typeof strength === 'object'
    main.show(mixed ? partOf(strength, card.components[0], 'mid') : strength, mixed)
    row.showParts()
    paint()
  }
  row.set = (strength) => {
    row.on.checked = true // whoever moves a style wants to see it
    row.show(strength)
    tell()
  }
  row.text = `${card.name} ${card.trigger}`.toLowerCase()
  row.node = make('li', { class: 'rack-card' },
    make('label', { class: 'face', title: card.name }, picture),
    make('div', { class: 'body' },
      make('div', { class: 'top' },
        make('label', { class: 'name' }, row.on, make('span', { text: card.name })),
        make('span', { class: 'size', text: card.facts })),
      main.node,
      make('div', { class: 'below' }, words, fold),
      card.note && make('p', { class: 'note', text: `⚠ ${card.note}` })))
  row.node.querySelector('.face').addEventListener('click', () => row.on.click())
  return row
}

function sift() {
  const wanted = filter.value.trim().toLowerCase()
  for (const row of rows.values()) row.node.hidden = !row.text.includes(wanted)
}

function showMix() {
  for (const [name, row] of rows) {
    const strength = (props.value ?? {})[name]
    row.on.checked = strength !== undefined
    row.show(strength ?? row.strength)
  }
  recount()
}

function showCards() {
  const before = new Map(rows)
  rows.clear()
  for (const card of props.cards) {
    rows.set(card.name, build(card))
    if (before.has(card.name)) rows.get(card.name).strength = before.get(card.name).strength
  }
  cards.replaceChildren(...[...rows.values()].map((row) => row.node))
  filter.parentElement.classList.toggle('few', rows.size < 7)
  element.querySelector('.rack-none').hidden = rows.size > 0
  showMix()
  sift()
}

filter.addEventListener('input', sift)
element.querySelector('.rack-clear').addEventListener('click', () => {
  for (const row of rows.values()) { row.on.checked = false; row.show(row.strength) }
  tell()
})
watch('cards', showCards)
watch('value', showMix)
showCards()

// a picture dropped anywhere on the page goes to the box that restores settings
document.addEventListener('dragover', (event) => event.preventDefault())
document.addEventListener('drop', (event) => {
  const files = event.dataTransfer?.files
  const box = document.querySelector('#restore input[type=file]')
  if (!files?.length || !box || event.target.closest('.block')?.querySelector('input[type=file]')) return
  event.preventDefault()
  box.files = files
  box.dispatchEvent(new Event('change', { bubbles: true }))
})
