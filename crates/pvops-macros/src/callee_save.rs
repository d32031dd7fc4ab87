//! `#[callee_save]`: a conventional function and the thunk beside it.

use proc_macro2::TokenStream;
use quote::quote;
use syn::{Error, ItemFn, LitStr, Result, parse_quote};

use crate::convention::X86_64;
use crate::signature::simple;
use crate::thunk;

/// See [`callee_save`](macro@crate::callee_save).
pub(crate) fn expand(attribute: TokenStream, item: TokenStream) -> Result<TokenStream> {
    if !attribute.is_empty() {
        return Err(Error::new_spanned(attribute, "callee_save takes no arguments"));
    }
    let mut function: ItemFn = syn::parse2(item)?;
    let parts = simple(&function.sig)?;
    if parts.never {
        return Err(Error::new_spanned(
            &function.sig.output,
            "a function that never returns has nothing to restore: declare the op as `jump`",
        ));
    }
    if let Some(attribute) = function.attrs.iter().find(|a| a.path().is_ident("target_feature"))
        && !matches!(function.sig.safety, syn::Safety::Unsafe(_))
    {
        return Err(Error::new_spanned(
            attribute,
            "the thunk can be called where the CPU lacks the feature: make the function `unsafe`",
        ));
    }
    match &function.sig.abi {
        None => function.sig.abi = Some(parse_quote!(extern "sysv64")),
        Some(abi) if abi.name.as_ref().map(LitStr::value).as_deref() == Some("sysv64") => {}
        Some(abi) => {
            return Err(Error::new_spanned(
                abi,
                "the thunk calls with the sysv64 convention: leave the ABI out, or say \
                 `extern \"sysv64\"`",
            ));
        }
    }
    let (name, vis, unsafety) = (&function.sig.ident, &function.vis, &function.sig.safety);
    let (names, types) = (&parts.names, &parts.types);
    let ret = parts.ret.iter();
    let ret2 = parts.ret.iter();
    let returned = parts.ret.iter();
    let lines = thunk::lines(&X86_64, "{callee}");
    let about = format!(
        "The thunk around [`{name}()`]: every argument and scratch register survives a call."
    );
    Ok(quote! {
        #function

        #[doc(hidden)]
        #[allow(non_camel_case_types)]
        #[derive(Debug)]
        #vis enum #name {}

        #[allow(dead_code)]
        impl #name {
            #[doc = #about]
            #vis const CALLEE_SAVE: ::pvops::CalleeSave<
                #unsafety extern "sysv64" fn(#(#types),*) #(-> #ret)*
            > = {
                const _: fn() = || {
                    fn word<T: ::pvops::Word>() {}
                    #(word::<#types>();)*
                    #(word::<#returned>();)*
                };
                // SAFETY: the thunk's text saves exactly the set that the table of
                // conventions says the caller keeps, and keeps the stack aligned.
                unsafe { ::pvops::CalleeSave::promise(Self::thunk) }
            };

            /// The thunk, as a name for `sym` operands of assembler.
            #[doc(hidden)]
            #[unsafe(naked)]
            #[allow(unused_variables, clippy::missing_safety_doc)]
            #vis #unsafety extern "sysv64" fn thunk(#(#names: #types),*) #(-> #ret2)* {
                ::core::arch::naked_asm!(#(#lines,)* callee = sym #name)
            }
        }
    })
}
