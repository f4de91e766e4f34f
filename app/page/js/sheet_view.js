// A sheet as a table of pictures with labels, built in the DOM alone, since labels come from strangers; each opens large.
// props.value is {axes, columns, rows, tables, cells: [{src, label, caption}], of} or null; props.actions is [{event, text}],
// and the events, which Gradio looks for in here, are 'send' and 'more'.
const tables = element.querySelector('.sheet-tables')
const large = element.querySelector('dialog')
const image = large.querySelector('img')
const words = large.querySelector('p')
let open = 0 // the number of the picture that is large

function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag)
  for (const [name, value] of Object.entries(attributes)) {
    if (name === 'text') node.textContent = value
    else if (name.startsWith('on')) node.addEventListener(name.slice(2), value)
    else node.setAttribute(name, value)
  }
  node.append(...children.filter(Boolean))
  return node
}

function show(place) {
  const cells = props.value.cells
  open = (place + cells.length) % cells.length
  image.src = cells[open].src
  image.alt = words.textContent = cells[open].label
  if (!large.open) large.showModal()
}

function cell(sheet, place) {
  const drawn = sheet.cells[place]
  if (!drawn) return make('td', {}, place < sheet.of && make('span', { class: 'sheet-wait' }))
  const picture = make('img', { src: drawn.src, alt: drawn.label, loading: 'lazy' })
  return make('td', {},
    make('button', { type: 'button', onclick: () => show(place) }, picture),
    drawn.caption && make('span', { class: 'sheet-caption', text: drawn.caption }))
}

function table(sheet, number) {
  const [x, y, z] = sheet.axes
  const wide = sheet.columns.length
  const sided = sheet.rows.some(Boolean)
  const axes = [x && `${x} →`, y && `${y} ↓`].filter(Boolean).join('\n')
  const head = make('tr', {}, sided && make('td', { class: 'sheet-axes', text: axes }),
    ...sheet.columns.map((label) => make('th', { scope: 'col', text: label })))
  const rows = sheet.rows.map((label, row) => make('tr', {}, sided && make('th', { scope: 'row', text: label }),
    ...sheet.columns.map((_, column) => cell(sheet, (number * sheet.rows.length + row) * wide + column))))
  return make('table', { style: `--columns: ${wide}` },
    sheet.tables[number] && make('caption', { text: `${z} ${sheet.tables[number]}` }),
    !sided && axes && make('caption', { text: axes }),
    sheet.columns.some(Boolean) && make('thead', {}, head), make('tbody', {}, ...rows))
}

function render() {
  const sheet = props.value
  tables.replaceChildren(...(sheet ? sheet.tables.map((_, number) => table(sheet, number)) : []))
  element.querySelector('.sheet-empty').hidden = Boolean(sheet)
}

const buttons = props.actions.map(({ event, text }) =>
  make('button', { type: 'button', class: 'sheet-action', text, onclick: () => { large.close(); trigger(event, { index: open }) } }))
large.querySelector('.sheet-actions').append(...buttons)
large.querySelector('.sheet-before').addEventListener('click', () => show(open - 1))
large.querySelector('.sheet-next').addEventListener('click', () => show(open + 1))
large.querySelector('.sheet-close').addEventListener('click', () => large.close())
large.addEventListener('click', (event) => { if (event.target === large) large.close() }) // beside the picture
large.addEventListener('close', () => tables.querySelectorAll('td button')[open]?.focus())
large.addEventListener('keydown', (event) => {
  const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key]
  if (step) show(open + step)
})
watch('value', render)
render()
