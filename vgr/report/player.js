"use strict";
// One clock for all videos: play, pause and scrub together; the dot on each camera path follows.
(() => {
  const bar = document.querySelector(".controls");
  if (!bar) return;
  const [button, slider, out] = [bar.querySelector("button"), bar.querySelector("input"), bar.querySelector("output")];
  const videos = [...document.querySelectorAll(".track video")];
  const dots = [...document.querySelectorAll(".here")].map(dot => [dot, JSON.parse(dot.dataset.path)]);
  const duration = Number(bar.dataset.seconds), fps = Number(bar.dataset.fps);
  let playing = false, now = 0, last = 0;
  const show = () => {
    slider.value = now / duration;
    out.textContent = `${now.toFixed(1)} / ${duration.toFixed(1)} s`;
    for (const [dot, path] of dots) {
      const [x, y, angle] = path[Math.max(0, Math.min(path.length - 1, Math.floor(now * fps)))];
      dot.setAttribute("transform", `translate(${x} ${y}) rotate(${angle})`);
    }
  };
  const seek = () => videos.forEach(v => { v.currentTime = Math.min(now + 0.5 / fps, duration - 0.25 / fps); });
  const visible = v => { const r = v.getBoundingClientRect(); return r.bottom > 0 && r.top < innerHeight; };
  const pause = () => { playing = false; button.textContent = "Play"; videos.forEach(v => v.pause()); seek(); };
  const step = time => {
    if (!playing) return;
    now += Math.max(0, time - last) / 1000; last = time;  // a frame's time may lie before the click
    if (now >= duration) { now = 0; seek(); }
    for (const v of videos) {
      if (!visible(v)) { v.pause(); continue; }
      if (Math.abs(v.currentTime - now) > 0.12) v.currentTime = now;
      if (v.paused) v.play().catch(() => {});
    }
    show(); requestAnimationFrame(step);
  };
  button.onclick = () => {
    if (playing) return pause();
    playing = true; button.textContent = "Pause"; last = performance.now(); requestAnimationFrame(step);
  };
  slider.oninput = () => { now = slider.value * duration; if (playing) pause(); seek(); show(); };
  show();
  videos.forEach(v => v.addEventListener("loadeddata", () => { if (!playing) v.currentTime = 0.5 / fps; }, { once: true }));
})();
