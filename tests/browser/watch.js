// Watches the page from inside, before its own scripts run: frames, long tasks, events, drawings.
// A frame's number counts animation frames; it is the same for all that happens until the next.

window.watched = { frames: [], tasks: [], events: [], drawn: [] };
{
  let frame = 0;
  const tick = (now) => {
    frame += 1;
    watched.frames.push(now);
    requestAnimationFrame(tick);
  };
  requestAnimationFrame(tick);
  new PerformanceObserver((list) => watched.tasks.push(...list.getEntries().map((one) => one.duration))).observe({ type: "longtask", buffered: true });

  const { read } = ReadableStreamDefaultReader.prototype;
  ReadableStreamDefaultReader.prototype.read = async function () {
    const result = await read.call(this);
    const text = typeof result.value === "string" ? result.value : "";
    const tokens = (text.match(/"origins":"\w/g) ?? []).length;
    if (tokens) watched.events.push({ frame, at: performance.now(), tokens });
    return result;
  };

  const isToken = (node) => node.classList?.contains("token");
  new MutationObserver((records) => {
    const answers = records.filter((one) => one.target.closest?.(".answer"));
    const added = answers.flatMap((one) => [...one.addedNodes]).reduce((all, one) => all + (isToken(one) ? 1 : one.querySelectorAll(".token").length), 0);
    const removed = answers.flatMap((one) => [...one.removedNodes]).length;
    const touched = answers.filter((one) => isToken(one.target)).length;
    if (answers.length) watched.drawn.push({ frame, at: performance.now(), added, removed, touched, changes: records.length });
  }).observe(document, { subtree: true, childList: true, attributes: true, characterData: true });
}
