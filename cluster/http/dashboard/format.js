// Numbers for people: each with its unit, widths that do not jump, a dash for what is not known.

const WHOLE = new Intl.NumberFormat("en");
export const NONE = "–";

export function count(value) {
  if (value === null || value === undefined) return NONE;
  const whole = Math.round(value);
  return Math.abs(whole) < 1000 ? String(whole) : WHOLE.format(whole);           // what formats thousands takes ten times as long
}

export function bytes(value) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (value >= 1024 && unit < units.length - 1) { value /= 1024; unit += 1; }
  return `${unit === 0 || value >= 100 ? Math.round(value) : value.toFixed(1)} ${units[unit]}`;
}

export function seconds(value) {
  if (value === null || value === undefined) return NONE;
  if (value < 0.0995) return `${(value * 1000).toFixed(value < 0.00995 ? 1 : 0)} ms`;
  if (value < 9.95) return `${value.toFixed(2)} s`;
  if (value < 99.5) return `${value.toFixed(1)} s`;
  if (value < 5400) return `${Math.floor(value / 60)} min ${String(Math.floor(value % 60)).padStart(2, "0")} s`;
  return `${(value / 3600).toFixed(1)} h`;
}

export function share(part, whole) {
  if (!whole) return NONE;
  const percent = (100 * part) / whole;
  return `${percent > 0 && percent < 10 ? percent.toFixed(1) : Math.round(percent)} %`;
}

export const plural = (number, word) => `${count(number)} ${word}${number === 1 ? "" : "s"}`;

export function clock(unix) {
  return new Date(unix * 1000).toLocaleTimeString("en-GB");
}

export function span(window_s) {
  return window_s >= 120 ? `last ${Math.round(window_s / 60)} min` : `last ${Math.round(window_s)} s`;
}
