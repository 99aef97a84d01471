// The routes of the API and the fields of their bodies, as /openapi.json describes them.

import { call } from "./server.js";

const place = document.getElementById("api");

function element(name, ...parts) {
  const made = document.createElement(name);
  made.append(...parts);
  return made;
}

/** What a field may be, in words: its type, or the name of another body. */
function kind(schema) {
  if (schema.$ref) return schema.$ref.split("/").at(-1);
  if (schema.anyOf) return schema.anyOf.map(kind).filter((each) => each !== "null").join(" or ");
  if (schema.enum) return schema.enum.map((each) => JSON.stringify(each)).join(" or ");
  if (schema.const !== undefined) return JSON.stringify(schema.const);
  if (schema.type === "array") return `list of ${kind(schema.items ?? {})}`;
  return schema.type ?? "anything";
}

function fields(schema) {
  const rows = Object.entries(schema.properties ?? {}).map(([name, field]) => {
    const wanted = schema.required?.includes(name) ? " (required)" : "";
    const cells = [element("code", name), kind(field) + wanted, field.description ?? ""];
    return element("tr", ...cells.map((each) => element("td", each)));
  });
  return element("table", element("tbody", ...rows));
}

function route(path, method, about, schemas) {
  const body = about.requestBody?.content["application/json"].schema;
  const told = element("span", about.summary ?? "");
  const title = element("summary", element("code", `${method.toUpperCase()} ${path}`), " ", told);
  return element("details", title, ...(body ? [fields(schemas[kind(body)])] : []));
}

try {
  const described = await (await call("GET", "openapi.json")).json();
  const schemas = described.components.schemas;
  const routes = Object.entries(described.paths).flatMap(([path, methods]) =>
    Object.entries(methods).map(([method, about]) => route(path, method, about, schemas)),
  );
  const bodies = Object.entries(schemas).map(([name, schema]) => {
    const title = element("summary", element("code", name), " ", element("span", schema.description ?? ""));
    return element("details", title, fields(schema));
  });
  place.append(element("h2", "Routes"), ...routes, element("h2", "Bodies"), ...bodies);
} catch (error) {
  const hint = error.status === 401 ? "; give the token on the page at /" : "";
  place.append(element("p", error.message + hint));
}
