//! The web page, as `web/` builds it.

use actix_web::http::header;
use actix_web::{HttpResponse, web};

use super::error::ApiError;
use crate::Error;

/// The page loads from and talks to this server alone, and no script makes elements of texts.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; \
    base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'";

fn file(kind: &str, body: &'static [u8]) -> HttpResponse {
    HttpResponse::Ok()
        .content_type(kind)
        // The files of another version have the same names.
        .insert_header((header::CACHE_CONTROL, "no-cache"))
        .insert_header((header::CONTENT_SECURITY_POLICY, POLICY))
        .insert_header((header::X_CONTENT_TYPE_OPTIONS, "nosniff"))
        .insert_header((header::REFERRER_POLICY, "no-referrer"))
        .body(body)
}

pub async fn page() -> HttpResponse {
    file("text/html; charset=utf-8", include_bytes!("page/index.html"))
}

pub async fn asset(name: web::Path<String>) -> Result<HttpResponse, ApiError> {
    match name.as_str() {
        "app.js" => Ok(file("text/javascript; charset=utf-8", include_bytes!("page/assets/app.js"))),
        "app.css" => Ok(file("text/css; charset=utf-8", include_bytes!("page/assets/app.css"))),
        "icon.svg" => Ok(file("image/svg+xml", include_bytes!("page/assets/icon.svg"))),
        _ => Err(Error::not_found("the page has no such file").into()),
    }
}

#[cfg(test)]
mod tests {
    use actix_web::body::to_bytes;

    use super::*;

    /// Of the page's own files it has all, and it names no other.
    #[actix_web::test]
    async fn the_page_names_files_that_are_served() {
        let body = to_bytes(page().await.into_body()).await.unwrap();
        let html = std::str::from_utf8(&body).unwrap();
        let named: Vec<&str> = ["src=\"", "href=\""]
            .iter()
            .flat_map(|attribute| html.split(attribute).skip(1))
            .map(|rest| rest.split('"').next().unwrap())
            .collect();
        assert_eq!(named.len(), 3, "{named:?}");
        for name in named {
            let name = name.strip_prefix("./assets/").unwrap_or_else(|| panic!("{name} is not an asset"));
            asset(name.to_string().into()).await.unwrap();
        }
        assert!(!html.contains("<script>") && !html.contains("<style"), "the policy refuses what is inline");
        asset("../page.rs".to_string().into()).await.unwrap_err();
    }
}
