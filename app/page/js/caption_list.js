// Pictures with their captions. props.pictures come from the server: name, src; props.value is the list of captions.
const list = element.querySelector('.captions')
const known = new Map() // by name: the caption that was typed

function recount() {
  const written = props.value.filter((text) => text.trim()).length
  const plural = (count, word) => `${count} ${word}${count === 1 ? '' : 's'}`
  const rest = written < props.pictures.length ? '; without one, a picture shows the words below' : ''
  element.querySelector('.caption-count').textContent =
    `${plural(props.pictures.length, 'picture')}, ${plural(written, 'caption')}${rest}`
}

function build(picture, place) {
  const box = make('textarea', { rows: 2, maxlength: 1000, placeholder: 'what this one shows', 'aria-label': `Caption of ${picture.name}` })
  box.value = props.value[place]
  box.addEventListener('input', () => {
    known.set(picture.name, box.value)
    props.value = props.value.map((text, at) => (at === place ? box.value : text))
    recount()
  })
  return make('li', {}, make('img', { src: picture.src, alt: picture.name, title: picture.name, loading: 'lazy' }), box)
}

function show() {
  props.value = props.pictures.map((picture, place) => known.get(picture.name) ?? (props.value ?? [])[place] ?? '')
  list.replaceChildren(...props.pictures.map(build))
  recount()
}

watch('pictures', show)
show()
